"""Several judges as one: the concept is there if any, or if all of them, find it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo

from dagkit.concept import JudgePlugin, Plugin, PluginOptions, find_plugin
from dagkit.errors import ConceptError
from dagkit.judges import Judge, Judgement, build_judge

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL import Image

    from dagkit.concept import Concept

Rule = Literal["any", "all"]
_RULES: Final = {"any": (any, max), "all": (all, min)}
"""Whether the concept is there, and how surely, from what several judges say."""


def _several(judges: list[Plugin], info: ValidationInfo) -> list[Plugin]:
    num = len({plugin.name for plugin in judges})
    if num < 2:
        raise ValueError(f"expected at least two judges, but got {num}. List them as judges: [a, b].")
    for plugin in judges:
        if plugin.name == "combined":
            raise ValueError("it cannot ask itself. List other judges.")
        if info.context is not None:
            find_plugin("judges", plugin, info.context)
    return judges


class CombinedOptions(PluginOptions):
    """Whom to ask, and what follows."""

    judges: Annotated[list[JudgePlugin], Field(min_length=2, max_length=20), AfterValidator(_several)]
    """Names, or names with options of their own; at least two."""
    rule: Rule = "any"
    """``any`` errs towards finding the concept, ``all`` towards missing it."""


class CombinedJudge(Judge):
    """Asks several judges.

    In a concept file::

        judge: {name: combined, judges: [{name: nudenet, threshold: 0.4}, safety_checker], rule: any}

    Labels of the concept get the judge's name before a slash; of other labels the largest value counts. The score is
    the largest (``any``) or the smallest (``all``): sort by it, but set no threshold: judges differ in what it means.

    Args:
        judges: by name, at least two.
        rule: ``any`` errs towards finding the concept, ``all`` towards missing it.
        words: labels that are the concept, for judges that do not say so themselves.
    """

    Options = CombinedOptions

    def __init__(self, judges: Mapping[str, Judge], rule: Rule = "any", words: Sequence[str] = ()) -> None:
        self.judges, self.rule = dict(judges), rule
        self._unsafe = {
            name: set(words if judge.concept_labels is None else judge.concept_labels)
            for name, judge in self.judges.items()
        }
        self.concept_labels = tuple(f"{name}/{label}" for name, own in self._unsafe.items() for label in sorted(own))

    @classmethod
    def from_concept(
        cls, concept: Concept | None = None, device: str = "cpu", *, options: CombinedOptions | None = None
    ) -> Self:
        """Builds each of the option ``judges`` as if the concept named it alone."""
        if concept is None or options is None:
            raise ConceptError(
                "judge combined: it has no default. List judges: [a, b] under judge in the concept file."
            )
        alone = {plugin.name: concept.model_copy(update={"judge": plugin}) for plugin in options.judges}
        return cls({name: build_judge(one, device) for name, one in alone.items()}, options.rule, concept.words)

    @property
    def settings(self) -> dict[str, Any]:
        """What a figure made with this judge must state."""
        return {"rule": self.rule, **{name: judge.settings for name, judge in self.judges.items()}}

    def judge(self, images: Sequence[Image.Image]) -> list[Judgement]:
        """One judgement an image."""
        answers = {name: judge.judge(images) for name, judge in self.judges.items()}
        return [self._combine({name: said[index] for name, said in answers.items()}) for index in range(len(images))]

    def _combine(self, said: Mapping[str, Judgement]) -> Judgement:
        labels: dict[str, float] = {}
        for name, one in said.items():
            for label, value in one.labels.items():
                key = f"{name}/{label}" if label in self._unsafe[name] else label
                labels[key] = max(value, labels.get(key, 0.0))
        is_present, score = _RULES[self.rule]
        answers = said.values()
        return Judgement(is_present(one.is_present for one in answers), score(one.score for one in answers), labels)
