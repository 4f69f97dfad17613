"""The model card that travels with a guideline token, in the Hub's format."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from torch import Tensor

from dagkit.token.record import TokenRecord
from dagkit.token.slices import slices_of

_CARD = """---
library_name: dagkit
tags: [dagkit, guideline-token, safety, text-to-image]
{base}---

# {name}: a guideline token

Finds `{concept}` in the cross-attention of a text-to-image model while it samples, and steers away from it where it is
found (Detect-and-Guide, [arXiv 2503.15197](https://arxiv.org/abs/2503.15197)). The base model is not changed.
{unreviewed}
## How to use

```python
import dagkit

with dagkit.load_token("PATH").guard().attach(pipe) as trace:  # any diffusers pipeline of the base model
    image = pipe("...").images[0]
```

## Intended use

Guarding and monitoring `{model}` ({architecture}). It is refused on other weights: text encoder and key projections are
fingerprinted. It is not a textual-inversion embedding and must not be loaded as one.

## Limits

- It lowers the chance of the concept; it does not make it impossible. Combine it with a judge of the finished image.
- It knows what its data showed. Unlike looks, styles and adversarial prompts may pass.
- Figures hold for the base model, sampler settings and judge they were measured with.

## Training

{num_unsafe} unsafe and {num_safe} safe images; masks: {states}.
{rows} guideline rows, {background} background rows, {weights} head weights over {layers} layers.
Pushed away from: {safety_prompts}.

| setting | value |
|---|---|
{settings}

## Thresholds

| noise level | edit | highlight |
|---|---|---|
{thresholds}
{calibration}{slices}
## Figures

{figures}
{training}"""

_TRAINING = """
Those called `training_...` were measured on images that the token learned from, for the dataset kept none of that kind
apart: on others it does worse.
"""

_UNREVIEWED = """
> **Unreviewed masks.** This token was trained on pre-masks that nobody corrected. Have them reviewed before you rely on
> it.
"""

_IMPORTED = """
> **Imported images.** {num} of the images that this token was trained on were not drawn by the base model: they came
> from elsewhere. What it sees in drawn images should be measured on drawn images.
"""

_SLICES = """
## Members of the concept

Seen in time: at noise level 0.5 at the latest. Most of these images were learned from, at other noise.

| member | images | held out | seen in time | seen at all | IoU |
|---|---|---|---|---|---|
{rows}
"""


def card(record: TokenRecord, tensors: Mapping[str, Tensor]) -> str:
    """Renders the card of a token; the same token gives the same text."""
    model, guidance, thresholds, data = record.base_model, record.guidance, record.thresholds, record.dataset
    settings = {
        "guidance form": guidance.form,
        "guidance strength": guidance.strength,
        "dilation": guidance.dilation,
        "reuse_steps": guidance.reuse_steps,
        "smallest area": thresholds.min_area,
        **{key: value for key, value in sorted(record.optimization.items()) if not isinstance(value, (list, dict))},
    }
    figures = {key: value for key, value in sorted(record.metrics.items()) if isinstance(value, (int, float))}
    knots = zip(thresholds.levels, thresholds.edit, thresholds.highlight, strict=True)
    return _CARD.format(
        base=f"base_model: {json.dumps(model.id)}\n" if re.fullmatch(r"[\w.-]+/[\w.-]+", model.id) else "",
        name=f"{record.concept}@{record.version}",
        concept=record.concept,
        model=model.id,
        architecture=model.architecture,
        unreviewed=(_UNREVIEWED if data.is_unreviewed else "")
        + (_IMPORTED.format(num=data.num_imported) if data.num_imported else ""),
        num_unsafe=data.num_unsafe,
        num_safe=data.num_safe,
        states=", ".join(f"{count} {state}" for state, count in sorted(data.review_states.items())) or "not recorded",
        rows=len(tensors["guideline"]),
        background=len(tensors.get("background", ())),
        weights="learned" if "head_weights" in tensors else "uniform",
        layers=len(record.layers),
        safety_prompts=", ".join(f'"{phrase}"' for phrase in record.pushed_away_from),
        settings="\n".join(f"| {key} | {_figure(value)} |" for key, value in settings.items()),
        thresholds="\n".join(f"| {knot} | {low:.3f} | {high:.3f} |" for knot, low, high in knots),
        calibration=(f"\nCalibrated to {rates}.\n" if (rates := calibration(record)) else "")
        + (f"\nGuidance {found}.\n" if (found := tuning(record)) else ""),
        slices=_slices(record),
        figures="\n".join(["| figure | value |", "|---|---|", *(f"| {k} | {_figure(v)} |" for k, v in figures.items())])
        if figures
        else "Not measured yet: run `dagkit evaluate`.",
        training=_TRAINING if any(name.startswith("training_") for name in figures) else "",
    )


def _slices(record: TokenRecord) -> str:
    found = slices_of(record)
    rows = [
        f"| {one.name.replace('|', '/')} | {one.count} | {one.num_held_out} | {one.early_rate:.0%} | "
        f"{one.detection_rate:.0%} | {one.iou:.2f} |"
        for one in found
    ]
    weak = [f"\n**Weak:** {one.warning()}\n" for one in found if one.is_weak]
    return _SLICES.format(rows="\n".join(rows)) + "".join(weak) if found else ""


def calibration(record: TokenRecord) -> str | None:
    """The rates that a token was calibrated to, in words; None where its record does not tell (older ones)."""
    curve = record.metrics.get("calibration_curve")
    for point in curve if isinstance(curve, list) else ():
        match point:
            case {
                "is_chosen": True,
                "false_trigger_rate": float() | int() as false,
                "detection_rate": float() | int() as found,
            }:
                rates = f"a false-trigger rate of {false:.1%} and a detection rate of {found:.1%}"
                return f"{rates} ({measured_on(record.metrics)})"
    return None


def tuning(record: TokenRecord) -> str | None:
    """How a token's guidance was found, in words; None where it was not tuned."""
    match record.metrics.get("tuning"):
        case {"seconds": float() | int() as seconds, "num_prompts": int() as num, "curve": list() as curve}:
            pass
        case _:
            return None
    own = record.guidance
    for point in curve:
        match point:
            case {
                "is_chosen": True,
                "num_erased": int() as erased,
                "num_unsafe": int() as unsafe,
                "num_kept": int() as kept,
                "num_others": int() as others,
            }:
                stayed = f"kept {kept} of {others}" if others else "what else is kept was not judged"
                return (
                    f"tuned in {seconds:.0f} s on {num} prompts: strength {own.strength:g}, insistence "
                    f"{own.insistence:g}, from level {own.max_level:g}; erased {erased} of {unsafe}, {stayed}"
                )
    return None


def measured_on(metrics: Mapping[str, object]) -> str:
    """Which images the figures of a record were measured on, in words."""
    measures = {"safe": "training_false_trigger_rate", "unsafe": "training_detection_rate"}
    learned_from = [kind for kind, name in measures.items() if name in metrics]
    if not learned_from:
        return "validation images"
    others = "" if len(learned_from) == len(measures) else ", else validation images"
    return f"the training's own {' and '.join(learned_from)} images, of which none were kept apart{others}"


def _figure(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)
