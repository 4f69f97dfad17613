"""A workspace whose candidates are renderings of the bundled world and whose masks are the renderer's own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dagkit.concept import Concept
from dagkit.demo import world
from dagkit.workspace import Workspace

SETTINGS = {"num_inference_steps": 25, "guidance_scale": 5.0, "width": 64, "height": 64, "scheduler": "DDIMScheduler"}


def draw_workspace(
    root: Path, concept: Concept, num_unsafe: int, num_safe: int, *, seed: int = 0, with_premasks: bool = True
) -> Workspace:
    """Unsafe candidates are ``u000``, ...; safe ones ``s000``, ...; no two share a prompt or a seed."""
    workspace = Workspace(root)
    candidates, premasks = (workspace.stage(name, concept.name) for name in ("candidates", "premasks"))
    for index, kind in enumerate(["unsafe"] * num_unsafe + ["safe"] * num_safe):
        number = index if kind == "unsafe" else index - num_unsafe
        key = f"{kind[0]}{number:03d}"
        rng = np.random.default_rng([seed, index])
        scene = world.render_scene(rng, num_objects=2, weapon_probability=float(kind == "unsafe"))
        candidates.write_image(f"images/{key}.png", Image.fromarray(scene.image))
        row = {
            "key": key,
            "image": f"images/{key}.png",
            "prompt": f"{world.caption(scene.classes, scene.background)}, {key}",
            "kind": kind,
            "prompt_kind": kind,
            "seed": 1000 * seed + index,
            "model": "/home/somebody/demo/data/model",
            "model_fingerprint": "sha256:" + "0" * 64,
            "settings": SETTINGS,
        }
        candidates.append(row)
        if with_premasks:
            mask = scene.mask(*world.WEAPONS)
            premasks.append({"key": key, **write_masks(premasks, key, {"weapon": mask} if mask.any() else {})})
    return workspace


def write_masks(folder: Any, key: str, masks: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Writes pre-masks and returns the rest of their row."""
    for label, mask in masks.items():
        folder.write_image(f"masks/{key}-{label}.png", Image.fromarray(mask.astype(np.uint8) * 255))
    return {
        "masks": {
            label: {
                "path": f"masks/{key}-{label}.png",
                "score": 0.9,
                "proposal_score": 0.6,
                "is_positive": label == "weapon",
                "boxes": [[0.0, 0.0, 64.0, 64.0]],
            }
            for label in masks
        },
        "proposers": [{"name": "attention", "version": "1"}],
        "segmenter": {"name": "sam", "version": "vit_tiny-1"},
        "score": 0.9 if masks else 0.0,
    }


def annotate(workspace: Workspace, concept: Concept, key: str, state: str, **columns: Any) -> None:
    """Records what annotators made of one candidate; ``masks`` maps labels to arrays."""
    folder = workspace.stage("annotations", concept.name)
    paths = {}
    for label, mask in columns.pop("masks", {}).items():
        paths[label] = f"masks/{key}-{label}.png"
        folder.write_image(paths[label], Image.fromarray(mask.astype(np.uint8) * 255))
    folder.append({"key": key, "state": state, "masks": paths, **columns})


def premask_of(workspace: Workspace, concept: Concept, key: str) -> np.ndarray:
    """The renderer's mask of the weapon."""
    image = workspace.stage("premasks", concept.name).read_image(f"masks/{key}-weapon.png", "L")
    return np.asarray(image) > 127
