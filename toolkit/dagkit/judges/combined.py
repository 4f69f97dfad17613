"""Several judges as one: the concept is there if any, or if all of them, find it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, Self, cast

from dagkit import plugins
from dagkit.concept import ManyPlugins, PluginOptions, Text, checked_options
from dagkit.errors import ConceptError, quoted
from dagkit.judges import Judgement

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from PIL import Image

    from dagkit.concept import Concept
    from dagkit.judges import Judge

RULES: Final = ("any", "all")
Rule = Literal["any", "all"]


class CombinedOptions(PluginOptions):
    """``judges``: names, or names with options of their own; ``rule``: as of `CombinedJudge`."""

    judges: ManyPlugins | None = None
    rule: Text = "any"


class CombinedJudge:
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
        if len(judges) < 2:
            raise ConceptError(
                f"judge combined: expected at least two judges, but got {len(judges)}. List them as judges: [a, b]."
            )
        if rule not in RULES:
            raise ConceptError(f"judge combined: rule must be one of {', '.join(RULES)}, but got {quoted(rule)}.")
        self.judges, self.rule = dict(judges), rule
        self._unsafe = {name: set(getattr(judge, "concept_labels", words)) for name, judge in self.judges.items()}
        self.concept_labels = tuple(f"{name}/{label}" for name, own in self._unsafe.items() for label in sorted(own))

    @classmethod
    def from_concept(cls, concept: Concept | None = None, device: str = "cpu") -> Self:
        """Builds each of the option ``judges`` as if the concept named it alone."""
        if concept is None or concept.judge.name != "combined":
            raise ConceptError(
                "judge combined: it has no default. List judges: [a, b] under judge in the concept file."
            )
        options = checked_options("judge combined", concept.judge.options, cls.Options)
        judges = {}
        for plugin in options.judges or []:
            if plugin.name == "combined":
                raise ConceptError("judge combined: it cannot ask itself. List other judges.")
            alone = concept.model_copy(update={"judge": plugin})
            judges[plugin.name] = plugins.load("judges", plugin.name).from_concept(alone, device=device)
        return cls(judges, cast("Rule", options.rule), concept.words)

    @property
    def settings(self) -> dict[str, Any]:
        """What a figure made with this judge must state."""
        own = {name: getattr(judge, "settings", {}) for name, judge in self.judges.items()}
        return {"rule": self.rule, **own}

    def judge(self, images: Sequence[Image.Image]) -> list[Judgement]:
        """One judgement an image."""
        answers = {name: judge.judge(images) for name, judge in self.judges.items()}
        return [self._combine({name: said[index] for name, said in answers.items()}) for index in range(len(images))]

    def _combine(self, said: Mapping[str, Judgement]) -> Judgement:
        present = [one.is_present for one in said.values()]
        scores = [one.score for one in said.values()]
        labels: dict[str, float] = {}
        for name, one in said.items():
            for label, value in one.labels.items():
                key = f"{name}/{label}" if label in self._unsafe[name] else label
                labels[key] = max(value, labels.get(key, 0.0))
        is_any = self.rule == "any"
        return Judgement(any(present) if is_any else all(present), max(scores) if is_any else min(scores), labels)
