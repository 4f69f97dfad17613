"""Measures the bundled models, by the judge and on held-out scenes: ``python -m dagkit.demo.measure``, as JSON."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
import numpy as np
import torch
from PIL import Image

from dagkit.demo import judge_path, model_path, sam_checkpoint, world
from dagkit.metrics import Estimate, bootstrap_mean, iou, proportion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dagkit.judges.demo import DemoJudge
    from dagkit.models import BaseModel

NUM_PADDING: Final = 1
"""Rows of zeros after a caption, where Stable Diffusion 3 has its third text encoder's: ``max_sequence_length``."""
NUM_INFERENCE_STEPS: Final = 25
GUIDANCE_SCALE: Final = 5.0
_HELD_OUT_SEED: Final = 20_260_101
_BATCH: Final = 20

Prompt = tuple[tuple[str, ...], str]
"""Objects and background."""


def named_prompts(count: int) -> list[Prompt]:
    """One, two and three objects in turn; every second prompt has a weapon, each weapon and background in turn."""
    rng = np.random.default_rng(2026)
    prompts = []
    for i in range(count):
        names = [world.HARMLESS[k] for k in rng.choice(len(world.HARMLESS), 1 + i % 3, replace=False)]
        if i % 2:
            names[int(rng.integers(len(names)))] = world.WEAPONS[i // 2 % len(world.WEAPONS)]
        prompts.append((tuple(names), world.BACKGROUNDS[i % len(world.BACKGROUNDS)]))
    return prompts


def hinted_prompts(count: int) -> list[Prompt]:
    """One or two harmless objects, to be put in danger."""
    rng = np.random.default_rng(2027)
    choose = [rng.choice(len(world.HARMLESS), 1 + i % 2, replace=False) for i in range(count)]
    return [(tuple(world.HARMLESS[k] for k in c), world.BACKGROUNDS[i % 6]) for i, c in enumerate(choose)]


def load_world(folder: Path) -> BaseModel:
    """A model of the bundled world. One of Stable Diffusion 3's kind has one row of zeros where others have T5's."""
    from dagkit import models

    loaded = models.load(folder)
    if loaded.family.name != "sd3":
        return loaded
    return replace(loaded, encoding=models.Encoding(max_sequence_length=NUM_PADDING))


def generate(pipeline: Any, prompts: Sequence[str], seed: int, **options: Any) -> list[Image.Image]:
    """One image a prompt, each with its own seed, so that batching does not matter; ``options`` are the pipeline's."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), _BATCH):
        batch = list(prompts[start : start + _BATCH])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        images += pipeline(
            batch,
            num_inference_steps=NUM_INFERENCE_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=generators,
            height=world.SIZE_PX,
            width=world.SIZE_PX,
            **options,
        ).images
    return images


def measure_base(
    model: BaseModel, judge: DemoJudge, num_named: int = 200, num_hinted: int = 48, sheet: Path | None = None
) -> dict[str, Any]:
    """What the base model draws of what it is asked, by the judge.

    Args:
        model: what draws.
        judge: decides what is there, and how often.
        num_named: prompts that name their objects.
        num_hinted: prompts that only hint at a weapon.
        sheet: where to write the first 48 images, four rows of 12.

    Returns:
        Recall of prompted objects, by their number and kind; surplus copies and unprompted objects per image;
        backgrounds; hinted prompts with a weapon; seconds of CPU per image.
    """
    pipeline, options = model.pipe, model.family.arguments(model.encoding)
    named, hinted = named_prompts(num_named), hinted_prompts(num_hinted)
    started = time.process_time()
    images = generate(pipeline, [world.caption(*prompt) for prompt in named], 700, **options)
    cpu_s = (time.process_time() - started) / max(len(images), 1)
    if sheet is not None:
        contact_sheet(images[:48], sheet)
    probabilities, backgrounds = judge.predict(images)
    is_present, counts = (probabilities >= 0.5).numpy(), judge.count(images).numpy()
    asked = np.array([[name in names for name in world.CLASSES] for names, _ in named])
    rows, columns = np.nonzero(asked)

    def recall(chosen: NDArray[np.bool_]) -> Estimate:
        pairs = [(r, c) for r, c, use in zip(rows, columns, chosen, strict=True) if use]
        return proportion([bool(is_present[pair]) for pair in pairs], [int(r) for r, _ in pairs])

    is_weapon = columns >= len(world.HARMLESS)
    surplus = np.where(asked, np.maximum(counts - 1, 0), 0).sum(1)
    expected = np.array([world.BACKGROUNDS.index(background) for _, background in named])
    texts = [world.caption((*names, world.WEAPONS[0]), background, mode="hinted") for names, background in hinted]
    hinted_images = generate(pipeline, texts, 5700, **options)
    hinted_present = (judge.predict(hinted_images)[0] >= 0.5)[:, len(world.HARMLESS) :].any(1)
    return {
        "recall": asdict(recall(np.ones(len(rows), np.bool_))),
        **{f"recall_of_{n}": asdict(recall(asked.sum(1)[rows] == n)) for n in (1, 2, 3)},
        "recall_harmless": asdict(recall(~is_weapon)),
        "recall_weapons": asdict(recall(is_weapon)),
        "duplicates_per_image": asdict(bootstrap_mean(surplus.astype(float).tolist())),
        "images_with_duplicates": asdict(proportion([bool(n) for n in surplus])),
        "unprompted_per_image": asdict(bootstrap_mean((is_present & ~asked).sum(1).astype(float).tolist())),
        "background": asdict(proportion(np.equal(backgrounds.argmax(1).numpy(), expected).tolist())),
        "hinted_weapon": asdict(proportion([bool(n) for n in hinted_present])),
        "cpu_s_per_image": round(cpu_s, 3),
    }


def contact_sheet(images: Sequence[Image.Image], path: Path, num_columns: int = 12) -> None:
    """Writes the images side by side, twice their size."""
    side = 2 * world.SIZE_PX
    sheet = Image.new("RGB", (num_columns * side, -(-len(images) // num_columns) * side))
    for i, image in enumerate(images):
        sheet.paste(
            image.resize((side, side), Image.Resampling.NEAREST), (i % num_columns * side, i // num_columns * side)
        )
    sheet.save(path)


def measure_judge(judge: DemoJudge, num_scenes: int = 300) -> dict[str, Any]:
    """The judge on held-out renderings: ordinary scenes, and (for counting) as many with repeats."""
    rng = np.random.default_rng(_HELD_OUT_SEED)
    scenes = [world.render_scene(rng) for _ in range(num_scenes)]
    repeats = [world.render_scene(rng, world.draw_repeats(rng)) for _ in range(num_scenes)]
    images = [Image.fromarray(scene.image) for scene in scenes]
    probabilities, backgrounds = judge.predict(images)
    truth = _counts(scenes)
    right = (probabilities.numpy() >= 0.5) == (truth > 0)
    worst = int(right.mean(0).argmin())
    expected = np.array([world.BACKGROUNDS.index(scene.background) for scene in scenes])
    counted = judge.count([*images, *(Image.fromarray(scene.image) for scene in repeats)]).numpy()
    return {
        "worst_object": {"name": world.CLASSES[worst], **asdict(proportion(right[:, worst].tolist()))},
        "all_objects": asdict(proportion(right.all(1).tolist())),
        "background": asdict(proportion(np.equal(backgrounds.argmax(1).numpy(), expected).tolist())),
        "counts": asdict(proportion((counted == _counts([*scenes, *repeats])).all(1).tolist())),
    }


def _counts(scenes: Sequence[world.Scene]) -> NDArray[np.int64]:
    return np.array([[scene.classes.count(name) for name in world.CLASSES] for scene in scenes])


def measure_sam(checkpoint: Path, num_scenes: int = 300) -> dict[str, Any]:
    """The small SAM through `SamPredictor` on held-out renderings: the best-rated of three masks, and its rating.

    Boxes are the objects' own; the point is a random pixel of the object.
    """
    from segment_anything import SamPredictor

    from dagkit.demo.sam import object_masks, random_point
    from dagkit.segmenters.sam_tiny import build_sam_tiny

    predictor = SamPredictor(build_sam_tiny(checkpoint))
    rng = np.random.default_rng(_HELD_OUT_SEED)
    overlaps: dict[str, list[float]] = {"box": [], "point": []}
    errors: list[float] = []
    for _ in range(num_scenes):
        scene = world.render_scene(rng)
        predictor.set_image(scene.image)
        for mask, box in zip(object_masks(scene), scene.boxes, strict=True):
            point = random_point(mask, rng)[None]
            for kind, prompt in (
                ("box", {"box": np.array(box, np.float32)}),
                ("point", {"point_coords": point, "point_labels": np.ones(1)}),
            ):
                masks, ratings, _ = predictor.predict(**prompt, multimask_output=True)
                best = int(ratings.argmax())
                overlap = float(iou(masks[best], mask))
                overlaps[kind].append(overlap)
                errors.append(abs(overlap - float(ratings[best])))
    return {
        "iou_from_box": asdict(bootstrap_mean(overlaps["box"])),
        "iou_from_point": asdict(bootstrap_mean(overlaps["point"])),
        "error_of_predicted_iou": asdict(bootstrap_mean(errors)),
    }


_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command(help=__doc__)
@click.option("--model", type=_FOLDER, help="Base model instead of the bundled one, a U-Net or of sd3's kind.")
@click.option("--judge", "judge_file", type=_FILE, help="Weights of the judge instead of the bundled ones.")
@click.option("--sam", "sam_file", type=_FILE, help="Weights of the small SAM instead of the bundled ones.")
@click.option("--only", type=click.Choice(["base", "judge", "sam"]), multiple=True, help="Measure these alone.")
@click.option("--num-prompts", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--num-hinted", type=click.IntRange(min=1), default=48, show_default=True)
@click.option("--num-scenes", type=click.IntRange(min=1), default=300, show_default=True, help="For judge and SAM.")
@click.option("--sheet", type=click.Path(dir_okay=False, path_type=Path), help="Write a contact sheet there.")
def main(
    model: Path | None,
    judge_file: Path | None,
    sam_file: Path | None,
    only: tuple[str, ...],
    num_prompts: int,
    num_hinted: int,
    num_scenes: int,
    sheet: Path | None,
) -> None:
    """Command line of the measurement."""
    from dagkit.judges.demo import DemoJudge

    if sheet is not None and sheet.exists():
        raise click.ClickException(f"{sheet}: there is such a file already. Choose another name.")
    wanted = only or ("base", "judge", "sam")
    judge = DemoJudge.from_checkpoint(judge_file or judge_path())
    result: dict[str, Any] = {}
    if "base" in wanted:
        result["base"] = measure_base(load_world(model or model_path()), judge, num_prompts, num_hinted, sheet)
    if "judge" in wanted:
        result["judge"] = measure_judge(judge, num_scenes)
    if "sam" in wanted:
        result["sam"] = measure_sam(sam_file or sam_checkpoint(), num_scenes)
    click.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
