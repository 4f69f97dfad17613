"""CLIP's own classes, small and with random weights, over the bundled world's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from dagkit import demo


def tiny_clip() -> tuple[Any, Any]:
    """Model and processor."""
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **tower,
        "vocab_size": 512,
        "max_position_embeddings": 16,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    vision = {**tower, "image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    size = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return model, CLIPProcessor(size, CLIPTokenizer.from_pretrained(demo.model_path() / "tokenizer"))


def save_tiny_clip(folder: Path) -> Path:
    """Writes it and returns the folder."""
    for part in tiny_clip():
        part.save_pretrained(folder)
    return folder
