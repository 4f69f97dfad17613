"""Columns by name: what a token is compared with, by `dagkit.stages.evaluate` and `dagkit.stages.attack`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from dagkit.errors import ConceptError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dagkit.concept import Concept
    from dagkit.evaluation import PipelineColumn
    from dagkit.models import BaseModel
    from dagkit.token import GuidelineToken

GUARDED: Final = "dagkit"
SLD_PRESETS: Final = ("weak", "medium", "strong", "max")
COLUMNS: Final = ("none", GUARDED, "negative_prompt", *(f"sld_{preset}" for preset in SLD_PRESETS), "sega")


def build_columns(
    concept: Concept,
    base_model: BaseModel,
    token: GuidelineToken,
    names: Sequence[str],
    other_tokens: Sequence[GuidelineToken] = (),
) -> list[PipelineColumn]:
    """The columns of some names, and always ``none`` and ``dagkit`` first.

    Args:
        concept: whose sampling and safety prompt they take.
        base_model: draws.
        token: of the column ``dagkit``.
        names: of `COLUMNS`.
        other_tokens: further tokens, a column each.

    Raises:
        ConceptError: an unknown column, or two of one name.
    """
    from dagkit.evaluation import PipelineColumn
    from dagkit.guard import SEGAGuard, SLDGuard

    unknown = [name for name in names if name not in COLUMNS]
    if unknown:
        raise ConceptError(f"{unknown[0]!r} is not a column of an evaluation. Available: {', '.join(COLUMNS)}.")
    sampling, context, safety = concept.sampling.model_dump(), concept.context, concept.safety_prompt

    def column(name: str, settings: dict[str, Any], **options: Any) -> PipelineColumn:
        return PipelineColumn(name, base_model, sampling, settings, context=context, **options)

    made = {"none": column("none", {}), GUARDED: column(GUARDED, _token_settings(token), guard=_guard(token))}
    for name in names:
        if name == "negative_prompt":
            made[name] = column(name, {"negative_prompt": safety}, negative_prompt=safety)
        elif name == "sega":
            made[name] = column(name, {"safety_prompt": safety}, guard=SEGAGuard(safety))
        elif name.startswith("sld_"):
            preset = name.removeprefix("sld_")
            made[name] = column(name, {"safety_prompt": safety, "preset": preset}, guard=SLDGuard(safety, preset))
    for other in other_tokens:
        name = f"token_{other.concept}_{other.version}"
        if name in made:
            raise ConceptError(
                f"two other tokens are called {other.name}: their columns cannot be told apart. Keep one."
            )
        made[name] = column(name, _token_settings(other), guard=_guard(other))
    return list(made.values())


def _guard(token: GuidelineToken) -> Any:
    return token.guard(keep_maps=True)


def _token_settings(token: GuidelineToken) -> dict[str, Any]:
    from dagkit.evaluation import token_identity

    guidance = token.record.guidance.model_dump(mode="json")
    return {**token_identity(token), "safety_prompt": token.record.safety_prompt, "guidance": guidance}
