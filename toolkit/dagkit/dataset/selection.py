"""Which candidates to send to annotators first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from dagkit.dataset.likeness import drop_near_duplicates
from dagkit.metrics import iou
from dagkit.segmenters import combine

if TYPE_CHECKING:
    from PIL import Image

    from dagkit.concept import Concept
    from dagkit.models import BaseModel
    from dagkit.proposers.token import TokenProposer
    from dagkit.workspace import StageFolder, Workspace

Selection = Literal["all", "uncertain", "diverse"]
SELECTIONS: Final[tuple[Selection, ...]] = ("all", "uncertain", "diverse")

_CELLS: Final = 8
_LATENT_CELLS: Final = 16


@dataclass(frozen=True, slots=True)
class Choice:
    """Candidates in the order in which annotators should see them.

    Attributes:
        keys: of the chosen ones, first things first.
        duplicates: key of a near-duplicate that was left out -> the candidate that it repeats.
    """

    keys: list[str]
    duplicates: dict[str, str]


def choose_candidates(
    workspace: Workspace,
    concept: Concept,
    selection: Selection = "all",
    *,
    num: int | None = None,
    is_dropping_duplicates: bool = True,
    base_model: BaseModel | None = None,
    token: TokenProposer | None = None,
) -> Choice:
    """Chooses among the pre-masked candidates of a concept.

    Args:
        workspace: with candidates and pre-masks.
        concept: whose candidates.
        selection: ``all`` in the order of the candidates; ``uncertain`` first where token and pre-mask disagree most,
            or, without a token, where the pre-mask is trusted least; ``diverse`` by the base model's latents, or,
            without a base model, by colour layout.
        num: how many; all where not given.
        is_dropping_duplicates: leave out images that look like an earlier one.
        base_model: for ``diverse``. Of 200 scenes of the bundled world, the first 32 by its latents show 52 pairs of
            thing and background; by colour layout 44, at random 49.
        token: an optimised token, for ``uncertain``.

    Raises:
        WorkspaceError: an image or a mask cannot be read; the message names it.
    """
    candidates, premasks = (workspace.stage(name, concept.name) for name in ("candidates", "premasks"))
    found = {row["key"]: row for row in premasks.rows()}
    rows = {row["key"]: row for row in candidates.present_rows() if row["key"] in found}
    keys, duplicates = list(rows), dict[str, str]()
    if is_dropping_duplicates:
        images = ((key, candidates.read_image(row["image"])) for key, row in rows.items())
        keys, duplicates = drop_near_duplicates(images)
    uncertainty = features = None
    if selection == "uncertain":
        uncertainty = {key: _uncertainty(rows[key], found[key], candidates, premasks, concept, token) for key in keys}
    if selection == "diverse":
        images = ((key, candidates.read_image(rows[key]["image"])) for key in keys)
        features = {
            key: layout_features(image) if base_model is None else latent_features(image, base_model)
            for key, image in images
        }
    return Choice(select(selection, keys, uncertainty=uncertainty, features=features, num=num), duplicates)


def _uncertainty(
    candidate: Mapping[str, Any],
    premask: Mapping[str, Any],
    candidates: StageFolder,
    premasks: StageFolder,
    concept: Concept,
    token: TokenProposer | None,
) -> float:
    """In [0, 1]. Without a token, a safe candidate is as sure as it can be: nothing was looked for in it."""
    if token is None:
        return 0.0 if candidate["kind"] == "safe" else 1.0 - float(premask["score"])
    image = candidates.read_image(candidate["image"])
    masks = {label: premasks.read_mask(mask["path"], image.size) for label, mask in premask["masks"].items()}
    expected = combine(masks, concept.labels.negative, (image.height, image.width))
    return disagreement(token.region(image, candidate["prompt"], candidate["seed"]), expected)


def select_uncertain(uncertainty: Mapping[str, float]) -> list[str]:
    """Keys by falling uncertainty; ties keep their order.

    Args:
        uncertainty: key -> in [0, 1], e.g. `disagreement`, or 1 minus the pre-mask's score.
    """
    return sorted(uncertainty, key=lambda key: -uncertainty[key])


def select_diverse(features: Mapping[str, NDArray[np.floating[Any]]], num: int | None = None) -> list[str]:
    """Keys so ordered that any beginning covers the images well: farthest-first traversal (Gonzalez 1985).

    Args:
        features: key -> (d,) float, e.g. `layout_features` or an embedding of the base model.
        num: how many; all where not given.

    Returns:
        The image next to the mean first, then always the one that is farthest from all before it.
    """
    keys = list(features)
    if not keys:
        return []
    points = np.stack([np.asarray(features[key], np.float64).ravel() for key in keys])
    chosen = [int(np.linalg.norm(points - points.mean(0), axis=1).argmin())]
    distance = np.linalg.norm(points - points[chosen[0]], axis=1)
    while len(chosen) < min(len(keys), num if num is not None else len(keys)):
        distance[chosen] = -1.0
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(points - points[chosen[-1]], axis=1))
    return [keys[index] for index in chosen]


def disagreement(token_region: NDArray[np.bool_], premask: NDArray[np.bool_]) -> float:
    """How much a guideline token and SAM differ about one image: 1 - IoU, in [0, 1]; 0 where both see nothing.

    Args:
        token_region: (H, W) bool, the token's highlighted region.
        premask: (H, W) bool.
    """
    return 1.0 - float(iou(token_region, premask))


def layout_features(image: Image.Image) -> NDArray[np.float64]:
    """(192,) float64 in [0, 1]: mean colour of each of 8x8 cells. A simple embedding that needs no model."""
    from PIL import Image as images  # noqa: N813

    small = image.convert("RGB").resize((_CELLS, _CELLS), images.Resampling.BOX)
    return np.asarray(small, np.float64).ravel() / 255


def latent_features(image: Image.Image, base_model: BaseModel) -> NDArray[np.float32]:
    """(C * 16 * 16,) float32: the base model's own latents of an image, averaged over cells, or repeated to fill them.

    Args:
        image: any size; resized to what the model takes.
        base_model: whose autoencoder to use.
    """
    import torch.nn.functional as F

    from dagkit.proposers.attention import fit_to_model

    latents = base_model.latents([fit_to_model(image, base_model)]).float()
    cells = F.adaptive_avg_pool2d(latents, (_LATENT_CELLS, _LATENT_CELLS))
    features: NDArray[np.float32] = cells.flatten().cpu().numpy()
    return features


def select(
    selection: Selection,
    keys: Sequence[str],
    *,
    uncertainty: Mapping[str, float] | None = None,
    features: Mapping[str, NDArray[np.floating[Any]]] | None = None,
    num: int | None = None,
) -> list[str]:
    """Orders candidates for annotators, and keeps the first ``num``.

    Args:
        selection: ``all`` keeps the order; ``uncertain`` needs ``uncertainty``; ``diverse`` needs ``features``.
        keys: of the candidates.
        uncertainty: key -> in [0, 1].
        features: key -> (d,) float.
        num: how many; all where not given.

    Raises:
        ValueError: what the selection needs is not given.
    """
    if selection == "uncertain":
        if uncertainty is None:
            raise ValueError("the selection 'uncertain' needs uncertainties.")
        return select_uncertain({key: uncertainty[key] for key in keys})[:num]
    if selection == "diverse":
        if features is None:
            raise ValueError("the selection 'diverse' needs features.")
        return select_diverse({key: features[key] for key in keys}, num)
    return list(keys)[:num]
