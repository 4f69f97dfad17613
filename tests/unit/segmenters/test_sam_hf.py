"""SAM and SAM 2 of transformers: exact architectures, small and with random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dagkit.concept import Concept, load_concept
from dagkit.errors import CheckpointError
from dagkit.proposers import Proposal
from dagkit.segmenters import Segmenter, build_segmenter
from dagkit.segmenters.cleaning import clean_mask

PROPOSALS = [
    Proposal((4, 4, 40, 40), 0.9, "weapon", point=(20.0, 20.0)),
    Proposal((30, 8, 60, 44), 0.5, "harmless", is_positive=False),
]


def save_sam(folder: Path) -> None:
    from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

    torch.manual_seed(0)
    config = SamConfig(
        vision_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64, "patch_size": 8,
            "output_channels": 16, "mlp_dim": 16, "num_pos_feats": 8, "window_size": 4, "global_attn_indexes": [0],
        },
        prompt_encoder_config={
            "hidden_size": 16, "image_size": 64, "patch_size": 8, "image_embedding_size": 8, "mask_input_channels": 4,
        },
        mask_decoder_config={
            "hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
            "num_hidden_layers": 1,
        },
    )  # fmt: skip
    SamModel(config).save_pretrained(folder)
    processor = SamImageProcessor(
        size={"longest_edge": 64},
        pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 32},
        mask_pad_size={"height": 32, "width": 32},
    )
    SamProcessor(processor).save_pretrained(folder)


def save_sam2(folder: Path) -> None:
    from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model, Sam2Processor

    torch.manual_seed(0)
    config = Sam2Config(
        vision_config={
            "backbone_config": {
                "model_type": "sam2_hiera_det_model", "hidden_size": 8, "num_attention_heads": 1,
                "image_size": [128, 128], "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 32, 64],
                "num_attention_heads_per_stage": [1, 1, 2, 2], "window_size_per_stage": [4, 4, 4, 4],
                "global_attention_blocks": [3], "window_positional_embedding_background_size": [4, 4],
            },
            "backbone_channel_list": [64, 32, 16, 8],
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
            "fpn_hidden_size": 16,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 128, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
            "num_hidden_layers": 1,
        },
    )  # fmt: skip
    Sam2Model(config).save_pretrained(folder)
    Sam2Processor(Sam2ImageProcessor(size={"height": 128, "width": 128})).save_pretrained(folder)


def with_model(folder: Path, **options: object) -> Concept:
    segmenter = {"name": "sam_hf", "model": str(folder), **options}
    return Concept.model_validate({**load_concept("weapon").model_dump(), "segmenter": segmenter})


@pytest.mark.parametrize("save", [save_sam, save_sam2], ids=["sam", "sam2"])
def test_masks_of_both_architectures(save, tmp_path: Path):
    save(tmp_path / "model")
    segmenter = build_segmenter(with_model(tmp_path / "model"))
    assert isinstance(segmenter, Segmenter)
    assert segmenter.version == "model-1"
    calls = []
    segmenter._model.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))

    masks = segmenter.segment(image, PROPOSALS * 20)
    assert len(calls) == 1  # one embedding, though the boxes need two passes of the decoder
    assert len(masks) == 40
    assert {mask.mask.shape for mask in masks} == {(48, 64)}
    assert all(0 <= mask.score <= 1 for mask in masks)
    assert [(mask.label, mask.is_positive) for mask in masks[:2]] == [("weapon", True), ("harmless", False)]
    assert segmenter.segment(image, []) == []

    boxes_only = build_segmenter(with_model(tmp_path / "model", use_points=False)).segment(image, PROPOSALS)
    assert [mask.box for mask in boxes_only] == [proposal.box for proposal in PROPOSALS]


@pytest.mark.parametrize("save", [save_sam, save_sam2], ids=["sam", "sam2"])
def test_score_is_predicted_iou_times_stability_and_masks_are_cleaned(save, tmp_path: Path):
    save(tmp_path / "model")
    segmenter = build_segmenter(with_model(tmp_path / "model", use_points=False))
    outputs, logits = [], []
    segmenter._model.register_forward_hook(lambda _m, _a, output: outputs.append(output))
    with torch.no_grad():  # sure of itself, as random weights are not
        decoder = segmenter._model.mask_decoder
        decoder.iou_prediction_head.proj_out.bias.fill_(0.7)
        for mlp in decoder.output_hypernetworks_mlps:
            mlp.proj_out.weight.mul_(1e6)
    post_process = segmenter._processor.post_process_masks
    segmenter._processor.post_process_masks = lambda *a, **kw: logits.append(post_process(*a, **kw)) or logits[-1]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
    masks = segmenter.segment(image, PROPOSALS)

    for index, mask in enumerate(masks):
        pixels = logits[0][0][index, 0].numpy()
        stable = (pixels > 1).sum() / max((pixels > -1).sum(), 1)
        iou = float(outputs[0].iou_scores[0, index, 0])
        assert iou > 0
        assert mask.score == pytest.approx(min(iou, 1.0) * stable, abs=1e-4)
        assert np.array_equal(mask.mask, clean_mask(pixels > 0))
    assert max(mask.score for mask in masks) > 0


def test_missing_weights_say_where_to_get_them(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"(?s)SAM cannot be loaded by transformers .*hf download facebook/sam2"):
        build_segmenter(with_model(tmp_path))
