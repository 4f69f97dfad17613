"""A Segment Anything model of 1 M parameters for the bundled world, built from `segment_anything`'s own classes.

It takes the code path of the large checkpoints: `segment_anything.SamPredictor(build_sam_tiny(checkpoint))`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from safetensors import SafetensorError
from safetensors.torch import load_file
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from dagkit.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

IMAGE_PX: Final = 128
PATCH_PX: Final = 8
WIDTH: Final = 128
_ENCODER_WIDTH: Final = 96


def build_sam_tiny(checkpoint: Path | None = None) -> Sam:
    """A `segment_anything.modeling.Sam` for images of 128 px, with masks of 64x64, in eval mode and float32.

    Args:
        checkpoint: safetensors written by ``python -m dagkit.demo.train sam``; without it the weights are random.

    Raises:
        CheckpointError: the file is missing, damaged or of another model.
    """
    cells = IMAGE_PX // PATCH_PX
    sam = Sam(
        image_encoder=ImageEncoderViT(
            img_size=IMAGE_PX,
            patch_size=PATCH_PX,
            embed_dim=_ENCODER_WIDTH,
            depth=4,
            num_heads=4,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            out_chans=WIDTH,
            qkv_bias=True,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=WIDTH,
            image_embedding_size=(cells, cells),
            input_image_size=(IMAGE_PX, IMAGE_PX),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=WIDTH, mlp_dim=256, num_heads=4),
            transformer_dim=WIDTH,
            iou_head_depth=3,
            iou_head_hidden_dim=64,
        ),
    )
    if checkpoint is not None:
        try:
            sam.load_state_dict(load_file(checkpoint))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"{checkpoint}: expected the weights of the small SAM (safetensors), but {error}. "
                "Train them with 'python -m dagkit.demo.train sam', or reinstall dagkit."
            ) from error
    return sam.float().eval()
