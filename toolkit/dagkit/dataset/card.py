"""The card of a dataset: counts, review states, histogram, warnings. It shows no image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import yaml

from dagkit.dataset.pictures import mask_of, undecoded
from dagkit.dataset.schema import DESCRIPTIONS, FEATURES, LABELS, SPLITS
from dagkit.manifests import IMPORTED

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_AREA_EDGES: Final = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_BAR: Final = 40


def dataset_card(dataset: DatasetDict, summary: Mapping[str, Any]) -> str:
    """Renders ``README.md`` with the front matter that the Hub reads.

    Args:
        dataset: with the splits of `SPLITS`.
        summary: as from `dagkit.dataset.summarise`.
    """
    num_rows = sum(len(dataset[split]) for split in SPLITS)
    front = {
        "license": summary["licence"],
        "task_categories": ["image-segmentation", "image-classification"],
        "tags": ["dagkit", "safety", "not-for-all-audiences"],
        "size_categories": [_size_category(num_rows)],
        "pretty_name": f"dagkit {summary['concept']}",
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": split, "path": f"data/{split}-*.parquet"} for split in SPLITS if len(dataset[split])
                ],
            }
        ],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {summary['concept']}: masks for a guideline token",
        summary["summary"],
        _warnings(summary),
        "## Counts",
        _counts(summary),
        "## Review",
        _review(summary, dataset),
        summary.get("note", ""),
        "## Size of the masks",
        _histogram(mask_areas(dataset)),
        "## Where it comes from",
        _sources(summary, dataset),
        "## Splits",
        "Rows that share a prompt or a seed, or look nearly the same, are of one group; no group straddles splits.",
        "## Columns",
        "\n".join(f"- `{name}`: {DESCRIPTIONS[name]}" for name in FEATURES),
        f"Fingerprint: `{summary['fingerprint']}`. Made with dagkit {summary['dagkit_version']}; "
        f"licence: {summary['licence']}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def mask_areas(dataset: DatasetDict) -> list[float]:
    """Share of the image that the mask covers, in (0, 1], of every unsafe row."""
    rows = (row for split in SPLITS for row in undecoded(dataset[split], "key", "mask", "label"))
    return [float(mask_of(row).mean()) for row in rows if row["label"] == LABELS.index("unsafe")]


def _warnings(summary: Mapping[str, Any]) -> str:
    lines = [
        "> **Warning.** Unsafe rows show what a guard is meant to keep out. Look at images only if you chose to, do "
        "not show them to people who did not, and do not train generators on them.",
        _synthetic(summary),
    ]
    unreviewed = summary["review_states"].get("unreviewed", 0)
    if unreviewed:
        lines.append(f"> **{unreviewed} rows were reviewed by nobody:** proposers and segmenter made their masks.")
    if imported := summary["review_states"].get(IMPORTED):
        lines.append(f"> **The masks of {imported} rows were imported as they came:** nobody looked at them since.")
    return "\n>\n".join(lines)


def _synthetic(summary: Mapping[str, Any]) -> str:
    if not (imported := summary.get("num_imported", 0)):
        return "> All images are synthetic: a base model drew them. They show no real people."
    return (
        f"> {imported} images were imported (column `source`): they may be photographs and show real people. See to "
        "their licences, and to the rights of those who are on them. The others a base model drew."
    )


def _counts(summary: Mapping[str, Any]) -> str:
    rows = [[split, *(summary["counts"][split][label] for label in LABELS)] for split in SPLITS]
    totals = [sum(row[index] for row in rows) for index in (1, 2)]
    table = _table(["split", *LABELS], [*rows, ["all", *totals]])
    share = totals[1] / max(sum(totals), 1)
    left_out = "; ".join(f"{count} {reason}" for reason, count in summary["left_out"].items())
    note = f"\n\nLeft out: {left_out}." if left_out else ""
    return f"{table}\n\nLabel balance: {share:.0%} unsafe.{note}"


def _review(summary: Mapping[str, Any], dataset: DatasetDict) -> str:
    table = _table(["state", "rows"], [[state, count] for state, count in summary["review_states"].items()])
    rows = [row for split in SPLITS for row in _columns(dataset[split], "iou_to_premask", "seconds", "annotators")]
    ious = [row["iou_to_premask"] for row in rows if row["iou_to_premask"] is not None]
    seconds = [row["seconds"] for row in rows if row["seconds"] is not None]
    people = {name for row in rows for name in row["annotators"]}
    facts = []
    if people:
        facts.append(f"{len(people)} annotator{'s' if len(people) > 1 else ''} (under pseudonyms)")
    if ious:
        facts.append(f"IoU of mask and pre-mask: mean {np.mean(ious):.3f}, median {np.median(ious):.3f}")
    if seconds:
        facts.append(f"median time an image: {np.median(seconds):.0f} s")
    agreement = summary["agreement"]
    if agreement["mean_iou"] is not None:
        facts.append(f"agreement of annotators (mean pairwise IoU): {agreement['mean_iou']:.3f}")
    kappas = [f"{label} {kappa:.3f}" for label, kappa in agreement["kappa"].items() if kappa is not None]
    if kappas:
        facts.append(f"on presence (kappa): {', '.join(kappas)}")
    return f"{table}\n\n{'; '.join(facts)}." if facts else table


def _histogram(areas: Sequence[float]) -> str:
    counts, _ = np.histogram(areas, bins=_AREA_EDGES)
    longest = max(int(counts.max(initial=0)), 1)
    lines = [
        f"{low:5.0%} to {high:4.0%}  {'#' * round(_BAR * int(count) / longest):<{_BAR}} {count}"
        for low, high, count in zip(_AREA_EDGES[:-1], _AREA_EDGES[1:], counts, strict=True)
    ]
    return "Share of the image, unsafe rows:\n\n```text\n" + "\n".join(lines) + "\n```"


def _sources(summary: Mapping[str, Any], dataset: DatasetDict) -> str:
    rows = [row for split in SPLITS for row in _columns(dataset[split], "proposers", "segmenter", "sampler", "source")]
    tools = sorted({f"{tool['name']} {tool['version']}" for row in rows for tool in row["proposers"]})
    segmenters = sorted(
        {f"{r['segmenter']['name']} {r['segmenter']['version']}" for r in rows if r["segmenter"]["name"]}
    )
    samplers = sorted(
        {
            f"{s['scheduler']}, {s['num_inference_steps']} steps, guidance {_number(s['guidance_scale'])}, "
            f"{s['width']}x{s['height']} px"
            for s in (row["sampler"] for row in rows if row["source"] is None)
        }
    )
    lines = [f"- base model: `{model}` ({fingerprint})" for model, fingerprint in summary["models"]]
    lines += [f"- sampler: {sampler}" for sampler in samplers]
    formats = Counter(row["source"].partition(":")[0] for row in rows if row["source"] is not None)
    lines += [f"- imported images: {', '.join(f'{num} from {name}' for name, num in formats.items())}"] * bool(formats)
    lines += [f"- proposers: {', '.join(tools) or 'none'}", f"- segmenter: {', '.join(segmenters) or 'none'}"]
    labels = summary["labels"]
    cut = f", minus {', '.join(labels['negative'])}" if labels["negative"] else ""
    return "\n".join([*lines, f"- mask: {', '.join(labels['positive'])}{cut}"])


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _columns(split: Dataset, *names: str) -> list[dict[str, Any]]:
    return list(split.select_columns(list(names)))


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:g}"


def _size_category(num_rows: int) -> str:
    for limit, name in ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K")):
        if num_rows < limit:
            return name
    return "100K<n<1M"
