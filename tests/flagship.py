"""A repository that looks like ``stable-diffusion-v1-5/stable-diffusion-v1-5`` on the Hub, small, of random weights.

The same files under the same names: safety checker, feature extractor, PNDM, a tokenizer without ``tokenizer.json``,
``.bin`` and ``.fp16`` beside the safetensors, single-file checkpoints at the root. Nothing but safetensors may be read,
so every pickle holds rubbish. The checker flags every picture: whoever draws with it draws black.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel

from dagkit.concept import load_concept
from loopback_hub import LoopbackHub, Repository

NAME = "stable-diffusion-v1-5/stable-diffusion-v1-5"
CHECKER = "CompVis/stable-diffusion-safety-checker"
RUBBISH = b"never read"

INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.6.0",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
FEATURE_EXTRACTOR = {
    "crop_size": 32,
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 32,
}
TOKENIZER = {
    "add_prefix_space": False,
    "bos_token": {"__type": "AddedToken", "content": "<|startoftext|>", "lstrip": False, "normalized": True,
                  "rstrip": False, "single_word": False},
    "do_lower_case": True,
    "eos_token": {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False, "normalized": True,
                  "rstrip": False, "single_word": False},
    "errors": "replace",
    "model_max_length": 77,
    "name_or_path": "openai/clip-vit-large-patch14",
    "pad_token": "<|endoftext|>",
    "special_tokens_map_file": "./special_tokens_map.json",
    "tokenizer_class": "CLIPTokenizer",
    "unk_token": {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False, "normalized": True,
                  "rstrip": False, "single_word": False},
}  # fmt: skip

OLD_KEYS = {
    "_class_name", "act_fn", "attention_head_dim", "block_out_channels", "center_input_sample",
    "cross_attention_dim", "down_block_types", "downsample_padding", "flip_sin_to_cos", "freq_shift",
    "in_channels", "latent_channels", "layers_per_block", "mid_block_scale_factor", "norm_eps",
    "norm_num_groups", "out_channels", "sample_size", "up_block_types",
}  # fmt: skip
"""Of a config in 2022; what diffusers has added since takes its default."""


def write_repository(folder: Path, *, seed: int = 0) -> Path:
    """Writes the repository's files, about 4 MB; returns ``folder``."""
    torch.manual_seed(seed)
    write_json(folder / "model_index.json", INDEX)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "feature_extractor" / "preprocessor_config.json", FEATURE_EXTRACTOR)
    num_tokens = write_tokenizer(folder / "tokenizer")
    write_part(folder / "safety_checker", make_checker())
    write_part(folder / "text_encoder", make_text_encoder(num_tokens))
    write_part(folder / "unet", make_unet())
    write_part(folder / "vae", make_vae())
    for ending in (".bin", ".safetensors"):
        (folder / "unet" / f"diffusion_pytorch_model.non_ema{ending}").write_bytes(RUBBISH)
    for name in ("v1-5-pruned", "v1-5-pruned-emaonly"):
        for ending in (".ckpt", ".safetensors"):
            (folder / f"{name}{ending}").write_bytes(RUBBISH)
    (folder / "v1-inference.yaml").write_text("model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n")
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\npipeline_tag: text-to-image\n---\n")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    return folder


def upload(hub: LoopbackHub, folder: Path, name: str = NAME) -> Repository:
    """Puts a folder's files on a Hub as a public repository."""
    hub.repositories[name] = Repository(is_private=False)
    hub.repositories[name].commit(
        {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    )
    return hub.repositories[name]


def write_part(folder: Path, module: Any) -> None:
    """Weights as the Hub has them, under their first names: plain, half precision, and both as pickles of rubbish."""
    module.save_pretrained(folder)
    plain = next(folder.glob("*.safetensors"))
    weights = {first_name(folder.name, name): value for name, value in load_file(plain).items()}
    weights |= {
        name.replace("position_embedding.weight", "position_ids"): torch.arange(len(value))[None]
        for name, value in weights.items()
        if name.endswith("position_embedding.weight")
    }
    halves = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    save_file(weights, plain, {"format": "pt"})
    save_file(halves, plain.with_suffix(".fp16.safetensors"), {"format": "pt"})
    stem = "pytorch_model" if plain.stem == "model" else plain.stem
    for name in (f"{stem}.bin", f"{stem}.fp16.bin"):
        (folder / name).write_bytes(RUBBISH)
    config = json.loads((folder / "config.json").read_text())
    old = {key: value for key, value in config.items() if key in OLD_KEYS} if "_class_name" in config else config
    write_json(folder / "config.json", {**old, "_diffusers_version": "0.6.0"})


def first_name(part: str, name: str) -> str:
    """What a weight was called in 2022."""
    if part == "text_encoder":
        return f"text_model.{name.removeprefix('text_model.')}"
    if part == "safety_checker":
        return re.sub(r"(vision_model\.)+", "vision_model.vision_model.", name)
    if part == "vae" and ".attentions." in name:
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new}.", f".{old}.")
    return name


def write_checker(folder: Path) -> Path:
    """The checker's own repository."""
    write_json(folder / "preprocessor_config.json", FEATURE_EXTRACTOR)
    make_checker().save_pretrained(folder)
    return folder


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_tokenizer(folder: Path) -> int:
    """CLIP's files with merges learned from the prompts of ``nudity``; returns the number of tokens."""
    concept = load_concept("nudity")
    texts = [prompt.text for kind in ("unsafe", "hinted", "safe") for prompt in concept.all_prompts(kind)]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*texts, concept.safety_prompt, *concept.words], trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")
    write_json(folder / "vocab.json", {piece: index for index, piece in enumerate(vocabulary)})
    write_json(folder / "tokenizer_config.json", TOKENIZER)
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    write_json(folder / "special_tokens_map.json", {**special, "pad_token": "<|endoftext|>"})
    return len(vocabulary)


def make_checker() -> StableDiffusionSafetyChecker:
    """A checker that flags everything: its thresholds lie below every cosine."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16))
    with torch.no_grad():
        for embeds in (checker.concept_embeds, checker.special_care_embeds):
            embeds.normal_()
        checker.concept_embeds_weights.fill_(-1.5)
        checker.special_care_embeds_weights.fill_(1.5)
    return checker


def make_text_encoder(num_tokens: int) -> CLIPTextModel:
    config = CLIPTextConfig(vocab_size=num_tokens, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                            num_attention_heads=2, max_position_embeddings=77, bos_token_id=0, eos_token_id=2,
                            pad_token_id=1, projection_dim=32)  # fmt: skip
    return CLIPTextModel(config)


def make_unet() -> UNet2DConditionModel:
    """SD 1.5's four levels and its block types, narrow."""
    return UNet2DConditionModel(sample_size=64, in_channels=4, out_channels=4, layers_per_block=2, norm_num_groups=8,
                                block_out_channels=(16, 32, 32, 32), cross_attention_dim=32,
                                attention_head_dim=4)  # fmt: skip


def make_vae() -> AutoencoderKL:
    """SD 1.5's VAE, an eighth of the image's sides, narrow."""
    return AutoencoderKL(sample_size=512, layers_per_block=2, block_out_channels=(8, 8, 8, 8), norm_num_groups=4,
                         latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 4,
                         up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
