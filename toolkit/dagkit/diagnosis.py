"""What this machine has and lacks, and whether all that a concept names is there and takes what it is given."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from dagkit.concept import Concept, Plugin

Status = Literal["ok", "missing", "off"]

_REQUIRED = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "datasets",
    "segment-anything",
    "label-studio-sdk",
    "safetensors",
)
_OPTIONAL = {
    "accelerate": "model offload",
    "nudenet": "the nudenet proposer and judge",
    "torchmetrics": "CLIP score and FID",
    "model-signing": "signed tokens",
    "pycocotools": "masks of COCO",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report: ``off`` is something optional that is not there."""

    status: Status
    what: str
    found: str
    hint: str = ""


def diagnose(concept: str | None = None) -> list[Finding]:
    """Looks at everything that dagkit may need.

    Args:
        concept: name of a concept whose proposers, segmenter and judge must be there.
    """
    return [*_versions(), *_devices(), *_bundled(), *_checkpoints(concept), *_servers()]


def _versions() -> Iterator[Finding]:
    is_new_enough = sys.version_info >= (3, 11)
    yield Finding(
        "ok" if is_new_enough else "missing",
        "Python",
        platform.python_version(),
        "" if is_new_enough else "Install 3.11 or newer.",
    )
    yield Finding("ok", "dagkit", metadata.version("dagkit"))
    for name in _REQUIRED:
        try:
            yield Finding("ok", name, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding("missing", name, "not installed", f"pip install {name}")
    for name, purpose in _OPTIONAL.items():
        try:
            yield Finding("ok", name, metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding("off", name, "not installed", f"Only for {purpose}: pip install {name}")


def _devices() -> Iterator[Finding]:
    import torch

    yield Finding("ok", "CPU", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            yield Finding("ok", f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {memory:.0f} GiB")
    elif torch.backends.mps.is_available():
        yield Finding("ok", "mps", "Apple GPU")
    else:
        yield Finding("off", "GPU", "none found", "The bundled model needs none; Stable Diffusion is slow without.")


def _bundled() -> Iterator[Finding]:
    from dagkit import demo

    for what, path in {
        "bundled model": demo.model_path() / "unet",
        "bundled judge": demo.judge_path(),
        "bundled SAM": demo.sam_checkpoint(),
    }.items():
        is_there = path.exists()
        hint = "" if is_there else "The installation is incomplete: install dagkit again from its wheel."
        yield Finding("ok" if is_there else "missing", what, "there" if is_there else f"{path} is not there", hint)


def _checkpoints(concept_name: str | None) -> Iterator[Finding]:
    from dagkit.concept import concept_names, load_concept
    from dagkit.errors import DagkitError

    lacking: Status = "missing" if concept_name else "off"
    for name in [concept_name] if concept_name else concept_names():
        try:
            concept = load_concept(name)
        except DagkitError as error:
            yield Finding(lacking, f"{name}: concept", str(error).split(". ")[0], _advice(error))
            continue
        yield _base_model(concept, lacking)
        for what, load in _plugins(concept):
            try:
                yield Finding("ok", f"{name}: {what}", load())
            except DagkitError as error:
                yield Finding(lacking, f"{name}: {what}", str(error).split(". ")[0], _advice(error))


def _base_model(concept: Concept, lacking: Status) -> Finding:
    from pathlib import Path

    from dagkit import models

    what, model = f"{concept.name}: base model", concept.model
    if model == "demo" or Path(model).is_dir():
        return Finding("ok", what, model)
    if not models.is_hub_id(model):
        return Finding(lacking, what, f"{model} is not there", "Name a folder or a Hub id as the concept's model.")
    if not models.is_cached(model):
        return Finding("off", what, f"{model}, not downloaded yet", "The first command that draws downloads it.")
    return Finding("ok", what, f"{model}, downloaded")


def _plugins(concept: Concept) -> Iterator[tuple[str, Callable[[], str]]]:
    """What a concept names, each with a function that loads it, weights included, and says what it found."""
    from dagkit.concept import find_plugin
    from dagkit.judges import build_judge
    from dagkit.segmenters import build_segmenter

    def proposer(plugin: Plugin) -> str:
        found, options = find_plugin("proposers", plugin, concept)
        if found.needs_base_model:
            return f"{plugin.name}, which looks through the base model"
        return f"{plugin.name} {found.from_concept(concept, options=options).version}"

    def segmenter() -> str:
        found = build_segmenter(concept)
        return f"{found.name} {found.version}"

    def judge() -> str:
        build_judge(concept)
        return concept.judge.name

    for plugin in concept.proposers:
        yield f"proposer {plugin.name}", partial(proposer, plugin)
    yield "segmenter", segmenter
    yield "judge", judge


def _servers() -> Iterator[Finding]:
    import httpx

    from dagkit.errors import LabelStudioError
    from dagkit.labelstudio.http import checked_url

    url = os.environ.get("DAGKIT_LABEL_STUDIO")
    key = "set" if os.environ.get("LABEL_STUDIO_API_KEY") else "not set"
    if url is None:
        yield Finding(
            "off",
            "Label Studio",
            f"DAGKIT_LABEL_STUDIO not set, LABEL_STUDIO_API_KEY {key}",
            "Or start the embedded one: dagkit label-studio up",
        )
        return
    try:
        url = checked_url(url)
        status = httpx.get(f"{url}/health", timeout=5).status_code
    except LabelStudioError as error:  # it may hold a password, so it is not shown
        yield Finding("missing", "Label Studio", "DAGKIT_LABEL_STUDIO is no address of a server", str(error))
        return
    except (httpx.RequestError, httpx.InvalidURL) as error:
        yield Finding(
            "missing", "Label Studio", f"{url}: {type(error).__name__}", "Is the server running, and the address right?"
        )
        return
    yield Finding(
        "ok" if status == 200 else "missing",
        "Label Studio",
        f"{url} answers {status}, LABEL_STUDIO_API_KEY {key}",
        "" if status == 200 else "Something answers there, but no healthy Label Studio.",
    )


def _advice(error: Exception) -> str:
    return str(error).partition(". ")[2]


def check_concept(concept: Concept) -> None:
    """Checks what a concept names beyond its own file: plugins, their options, and its labelling page.

    Raises:
        ConceptError: unknown plugins or options; all of them in one message.
        LabelStudioError: the page is no page for this concept.
    """
    from dagkit.concept import page_path
    from dagkit.labelstudio.config import labelling_page

    check_plugins(concept)
    if page_path(concept) is not None:
        labelling_page(concept)


def check_plugins(concept: Concept) -> None:
    """Checks the plugins that a concept names, and their options.

    Raises:
        ConceptError: unknown plugins or options; all of them in one message.
    """
    from dagkit import plugins
    from dagkit.concept import find_plugin
    from dagkit.errors import ConceptError, DagkitError

    named: list[tuple[plugins.Kind, Plugin]] = [
        *(("proposers", plugin) for plugin in concept.proposers),
        ("segmenters", concept.segmenter),
        ("judges", concept.judge),
    ]
    mistakes = []
    for kind, plugin in named:
        try:
            find_plugin(kind, plugin, concept)
        except DagkitError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConceptError("\n".join(mistakes))
