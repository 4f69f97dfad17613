"""How a pipeline calls its denoiser: which rows of a call are conditional, and how a change is folded back.

Four layouts are here: one call ``[unconditional; conditional]`` (`Batched`), two calls a step (`Paired`), no
classifier-free guidance (`Single`), and guidance that was distilled into the prediction (`Distilled`). Whoever guides
sees ``eps_u``, ``eps_p`` and other predictions of the samples, and nothing of batches; names of arguments, type of the
output, how latents are packed, prompt masks and further conditions are the layout's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor

from dagkit.errors import GuardError

_LORA_ARGUMENTS: Final = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
ROUNDING: Final = 0.02
"""Share of a text row's length by which batches and half precision may move it."""


@dataclass(frozen=True)
class Condition:
    """What a denoiser is conditioned on.

    Attributes:
        hidden_states: (B, L, d) text-encoder output, the denoiser's ``encoder_hidden_states``.
        added: further conditions by name, e.g. SDXL's ``text_embeds`` (B, p); empty for SD 1.x/2.x.
        mask: (B, L) where ``hidden_states`` is text and not padding; None where all of it counts.
    """

    hidden_states: Tensor
    added: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor | None = None

    def __getitem__(self, index: Any) -> Condition:
        return Condition(
            self.hidden_states[index],
            {name: value[index] for name, value in self.added.items()},
            None if self.mask is None else self.mask[index],
        )

    def side_by_side(self) -> Condition:
        """All B texts as one of B * L rows: cross-attention takes at every position those that fit what is there.

        Further conditions are their mean.
        """
        return Condition(
            self.hidden_states.flatten(0, 1)[None],
            {name: value.mean(0, keepdim=True) for name, value in self.added.items()},
            None if self.mask is None else self.mask.flatten()[None],
        )

    def lengthened(self, length: int) -> Condition:
        """The same text over and over until it has ``length`` rows, a multiple of its own; attention gives the same."""
        times = length // self.hidden_states.shape[1]
        mask = None if self.mask is None else self.mask.repeat(1, times)
        return Condition(self.hidden_states.repeat(1, times, 1), self.added, mask)


class Packing:
    """How latents lie in a denoiser's arguments and output; this one: (B, C, H, W), as everywhere else."""

    def pack(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) as the denoiser wants it."""
        return latents

    def unpack(self, packed: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """(B, C, H, W) of what the denoiser got or gave.

        Args:
            packed: the latents, or a prediction.
            arguments: of the call by name.

        Raises:
            GuardError: nobody can tell where its rows lie.
        """
        return packed


_AS_THEY_ARE: Final = Packing()


@dataclass(frozen=True)
class Arguments:
    """How a denoiser calls what it gets.

    Attributes:
        sample: the noised latents.
        timestep: of the scheduler.
        condition: the text.
        mask: of the text; None where the denoiser takes none.
        added: the dictionary of further conditions; None where each is an argument of its own.
        timestep_unit: what the scheduler's timestep was divided by.
        packing: how the latents lie.
        shared: arguments that are for all samples, even where their first side is as long as the batch.
    """

    sample: str = "sample"
    timestep: str = "timestep"
    condition: str = "encoder_hidden_states"
    mask: str | None = "encoder_attention_mask"
    added: str | None = "added_cond_kwargs"
    timestep_unit: float = 1.0
    packing: Packing = _AS_THEY_ARE
    shared: frozenset[str] = frozenset()


class Call:
    """One denoiser call.

    Attributes:
        arguments: by name.
        names: what they mean.
        sample: the latents, (rows, C, H, W).
        timestep: of the scheduler, as precisely as the denoiser was told.
    """

    def __init__(self, arguments: dict[str, Any], names: Arguments) -> None:
        self.arguments, self.names = arguments, names
        self.sample: Tensor = self.unpacked(arguments[names.sample])
        self.timestep = float(torch.as_tensor(arguments[names.timestep]).flatten()[0]) * names.timestep_unit

    @property
    def lora_scale(self) -> float:
        """Factor of all LoRA layers during this call alone: ``cross_attention_kwargs={"scale": ...}`` and its kin."""
        given: dict[str, Any] = next((self.arguments[name] for name in _LORA_ARGUMENTS if self.arguments.get(name)), {})
        return float(given.get("scale", 1.0))

    @property
    def hidden_states(self) -> Tensor:
        """The text of all rows, (rows, L, d)."""
        hidden: Tensor = self.arguments[self.names.condition]
        return hidden

    @property
    def added(self) -> dict[str, Any]:
        """Further conditions of all rows by name."""
        if self.names.added is not None:
            return self.arguments.get(self.names.added) or {}
        known = (self.names.sample, self.names.timestep, self.names.condition, self.names.mask)
        return {name: value for name, value in self.arguments.items() if name not in known}

    @property
    def latent_size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.sample.shape[-2], self.sample.shape[-1]

    def unpacked(self, value: Tensor) -> Tensor:
        """(rows, C, H, W) of latents or of a prediction."""
        return self.names.packing.unpack(value, self.arguments)


@dataclass(frozen=True)
class Half:
    """The rows of a denoiser call that are conditional, or those that are not.

    Attributes:
        call: which.
        start: first of them.
        num: how many.
    """

    call: Call
    start: int
    num: int

    @property
    def rows(self) -> slice:
        """Of the call."""
        return slice(self.start, self.start + self.num)

    def under(self, rows: Tensor, conditions: Sequence[tuple[Condition, int]]) -> dict[str, Any]:
        """Arguments for some samples of this half, under other conditions.

        Args:
            rows: indices into the half.
            conditions: of one prompt each, with the number of rows that they are for, in order; their lengths are
                multiples of the shortest.
        """
        call, names = self.call, self.call.names
        batch = len(call.sample)
        longest = max(one.hidden_states.shape[1] for one, count in conditions if count)
        conditions = [(one.lengthened(longest), count) for one, count in conditions if count]
        index = rows.to(call.sample.device) + self.start
        arguments = {
            name: value if name in names.shared else _rows(value, index, batch)
            for name, value in call.arguments.items()
        }
        arguments[names.condition] = _repeated([(one.hidden_states, n) for one, n in conditions], call.hidden_states)
        if names.mask is not None:
            masks = [(one.mask, n) for one, n in conditions if one.mask is not None]
            given = call.arguments.get(names.mask)
            arguments[names.mask] = _repeated(masks, given) if masks and given is not None else None
        known = call.added
        added = {
            name: _repeated([(one.added[name], n) for one, n in conditions], known[name])
            for name in conditions[0][0].added
        }
        if names.added is None:
            arguments |= added
        elif added:
            arguments[names.added] = {**arguments[names.added], **added}
        return {**arguments, "return_dict": False}

    def says_nothing(self, other: Half, neutral: Sequence[Condition]) -> Tensor:
        """(B,) bool, on the CPU: where this half asks for nothing in particular.

        There its text is one of ``neutral``, and nothing else that it is conditioned on differs from the other half. A
        negative prompt, other embeddings, a negative picture or other size conditions are something.
        """
        hidden, added = self.call.hidden_states[self.rows], self.call.added
        found = torch.zeros(self.num, dtype=torch.bool)
        for condition in neutral:
            is_this = is_close(hidden, condition.hidden_states)
            for name, value in condition.added.items():
                is_this &= is_close(added[name][self.rows, None], value[:, None])
            found |= is_this & self._is_masked_as(condition)
        others = [name for name in added if not neutral or name not in neutral[0].added]
        return found & all(self._agrees(added[name], other, other.call.added.get(name)) for name in others)

    def _is_masked_as(self, condition: Condition) -> Tensor:
        """(B,) bool, on the CPU: where of this half's text as much is attended to as of a condition of its length."""
        given = None if self.call.names.mask is None else self.call.arguments.get(self.call.names.mask)
        if condition.mask is None or given is None:
            return torch.full((self.num,), condition.mask is None and given is None)
        mine = given[self.rows].bool().cpu()
        if mine.shape[1:] != condition.mask.shape[1:]:
            return torch.zeros(self.num, dtype=torch.bool)
        found: Tensor = (mine == condition.mask.bool().cpu()).flatten(1).all(1)
        return found

    def _agrees(self, mine: Any, other: Half, theirs: Any) -> bool:
        """Whether every tensor with a row a sample, inside lists, tuples and dicts too, is the same in both halves."""
        if isinstance(mine, Tensor):
            if not isinstance(theirs, Tensor):
                return False
            if mine.dim() == 0 or len(mine) != len(self.call.sample):
                return mine is theirs or torch.equal(mine, theirs)
            return torch.equal(mine[self.rows], theirs[other.rows])
        if isinstance(mine, dict):
            return isinstance(theirs, dict) and all(self._agrees(mine[key], other, theirs.get(key)) for key in mine)
        if isinstance(mine, (list, tuple)):
            return isinstance(theirs, type(mine)) and all(
                self._agrees(one, other, that) for one, that in zip(mine, theirs, strict=True)
            )
        return True


@dataclass
class Step:
    """What the calls of one step of the scheduler have said so far.

    Attributes:
        num_calls: seen.
        p: the conditional rows.
        u: the unconditional rows; None where there are none, or not yet.
        eps_p: (B, C, H, W) their prediction.
        eps_u: (B, C, H, W) theirs.
    """

    num_calls: int = 0
    p: Half | None = None
    u: Half | None = None
    eps_p: Tensor | None = None
    eps_u: Tensor | None = None

    def is_conditional(self, call: Call) -> bool:
        """Whether a call has the conditional rows."""
        return self.p is not None and self.p.call is call


class CallLayout(ABC):
    """How a pipeline calls its denoiser.

    Args:
        names: how the denoiser calls what it gets.

    Attributes:
        num_calls: denoiser calls a step.
        has_guidance: whether the pipeline guides, so that it multiplies what is added to ``eps_p``.
    """

    num_calls: ClassVar[int] = 1
    has_guidance: ClassVar[bool] = True

    def __init__(self, names: Arguments | None = None) -> None:
        self.names = names or Arguments()

    def check(self, pipe: Any, denoiser: Any) -> None:
        """Refuses a run that is not as this layout says, before its first call.

        Raises:
            GuardError: it has no classifier-free guidance.
        """
        if not self.has_guidance or self.is_guided(pipe):
            return
        kind = type(pipe).__name__
        if getattr(denoiser.config, "time_cond_proj_dim", None) is not None:
            raise GuardError(
                f"{type(denoiser).__name__} was distilled with its guidance built in (time_cond_proj_dim), as LCMs "
                f"are, so {kind} runs without classifier-free guidance and there is no unconditional "
                "prediction to guide from. Use the model that it was distilled from."
            )
        raise GuardError(
            f"{kind} runs without classifier-free guidance, so there is no unconditional prediction to guide "
            "from. Set guidance_scale above 1 (and no callback that turns it off)."
        )

    def is_guided(self, pipe: Any) -> bool:
        """Whether the run that is under way has classifier-free guidance, as far as the pipeline tells."""
        return bool(getattr(pipe, "do_classifier_free_guidance", True))

    def guidance_scale(self, pipe: Any) -> float | None:
        """How many times the difference of two predictions counts in a run; None where the pipeline does not tell."""
        scale = getattr(pipe, "guidance_scale", None)
        return None if scale is None else float(scale)

    def enter(self, kind: str, step: Step, arguments: dict[str, Any]) -> Call:
        """Before a call: what it is, with its halves in ``step``.

        Args:
            kind: the pipeline's class, for messages.
            step: of this call; changed.
            arguments: of the call by name.

        Raises:
            GuardError: it is not as this layout says.
        """
        call = Call(arguments, self.names)
        self._enter(kind, step, call)
        if len(call.hidden_states) != len(call.sample):
            raise GuardError(
                f"{kind} passes {len(call.hidden_states)} conditions for a batch of {len(call.sample)}; expected one "
                "each."
            )
        step.num_calls += 1
        return call

    def is_aside(self, arguments: dict[str, Any], last: Step | None) -> bool:
        """Whether a call is none of a step's own: the pipeline makes it beside them, and it needs no guard.

        Args:
            arguments: of the call by name.
            last: the step whose calls were all seen, where the scheduler has not taken it yet.

        Raises:
            GuardError: it is not as this layout says.
        """
        return False

    @abstractmethod
    def _enter(self, kind: str, step: Step, call: Call) -> None:
        """Sets the halves of ``step`` that are in this call."""

    def leave(self, step: Step, call: Call, output: Any) -> None:
        """After a call: takes the predictions of its halves into ``step``."""
        prediction = call.unpacked(_whole(output))[:, : call.sample.shape[1]]
        if step.p is not None and step.p.call is call:
            step.eps_p = prediction[step.p.rows]
        if step.u is not None and step.u.call is call:
            step.eps_u = prediction[step.u.rows]

    @abstractmethod
    def fold(self, step: Step, guided: Tensor, guidance_scale: float) -> Tensor:
        """What the last call of a step must return, so that the pipeline gets what it would with another ``eps_p``.

        Args:
            step: with all its calls.
            guided: (B, C, H, W) instead of ``eps_p``.
            guidance_scale: of the pipeline.

        Returns:
            The prediction of all rows of the last call.
        """

    def returned(self, call: Call, output: Any, prediction: Tensor) -> Any:
        """The output of a call with another prediction; what else it holds (learned variances) stays."""
        whole = call.unpacked(_whole(output))
        if whole.shape[1] > prediction.shape[1]:
            prediction = torch.cat([prediction, whole[:, prediction.shape[1] :]], 1)
        prediction = self.names.packing.pack(prediction)
        return (prediction, *output[1:]) if isinstance(output, tuple) else type(output)(sample=prediction)


def refuse_caches(denoiser: Any) -> None:
    """Refuses a denoiser that takes parts of its output from earlier calls (``enable_cache`` and its kin of diffusers).

    What was kept for the pipeline's rows would be handed to the safety forward, and skipped layers see nothing.

    Raises:
        GuardError: it does.
    """
    names = {
        name
        for module in denoiser.modules()
        for name in getattr(module.__dict__.get("_diffusers_hook"), "hooks", ())
        if "cache" in name or name.startswith(("fbc_", "pyramid_attention_broadcast"))
    }
    if names or getattr(denoiser, "is_cache_enabled", False):
        kind = type(getattr(denoiser, "_orig_mod", denoiser)).__name__
        raise GuardError(
            f"{kind} keeps what its blocks computed for later calls ({', '.join(sorted(names)) or 'enable_cache'}), so "
            "what a guard sees and asks for would be of another call. Load the model "
            "again and leave the cache off (disable_cache(), where it has that)."
        )


class Batched(CallLayout):
    """One call a step, ``[unconditional; conditional]``: SD 1.x, 2.x and XL, SD3, PixArt, Sana."""

    def _enter(self, kind: str, step: Step, call: Call) -> None:
        half = len(call.sample) // 2
        if len(call.sample) % 2 or not torch.equal(call.sample[:half], call.sample[half:]):
            raise GuardError(
                f"{kind} calls its denoiser with a batch of {len(call.sample)} that is not [unconditional; "
                "conditional] of the same latents. This batch layout is unknown, so nothing is generated."
            )
        step.u, step.p = Half(call, 0, half), Half(call, half, half)

    def fold(self, step: Step, guided: Tensor, guidance_scale: float) -> Tensor:
        """``[eps_u; guided]``."""
        assert step.eps_u is not None
        return torch.cat([step.eps_u, guided])


class Paired(CallLayout):
    """Two calls a step, of the same latents: Qwen-Image, Wan, Lumina 2.

    Args:
        first: which of them comes first.
        names: how the denoiser calls what it gets.
    """

    num_calls: ClassVar[int] = 2

    def __init__(
        self, first: Literal["conditional", "unconditional"] = "conditional", names: Arguments | None = None
    ) -> None:
        super().__init__(names)
        self.first = first

    def _enter(self, kind: str, step: Step, call: Call) -> None:
        known = step.p or step.u
        if known is not None and not torch.equal(known.call.sample, call.sample):
            raise GuardError(
                f"{kind} calls its denoiser again with other latents before its scheduler took a step; expected a "
                "conditional and an unconditional call of the same ones. This layout is unknown, so nothing is "
                "generated."
            )
        half = Half(call, 0, len(call.sample))
        if (step.num_calls == 0) == (self.first == "conditional"):
            step.p = half
        else:
            step.u = half

    def fold(self, step: Step, guided: Tensor, guidance_scale: float) -> Tensor:
        """``guided`` where the conditional call is the last one, else ``eps_u + s / (s - 1) * (eps_p - guided)``."""
        if self.first == "unconditional":
            return guided
        assert step.eps_u is not None
        assert step.eps_p is not None
        if guidance_scale <= 1:
            raise GuardError(f"a guidance scale of {guidance_scale:g} leaves nothing to guide with; set it above 1.")
        change = step.eps_p.float() - guided.float()
        return (step.eps_u.float() + guidance_scale / (guidance_scale - 1) * change).to(step.eps_u.dtype)


class Single(CallLayout):
    """One conditional call a step and nothing to guide from."""

    has_guidance: ClassVar[bool] = False

    def _enter(self, kind: str, step: Step, call: Call) -> None:
        step.p = Half(call, 0, len(call.sample))

    def fold(self, step: Step, guided: Tensor, guidance_scale: float) -> Tensor:
        """``guided``."""
        return guided

    def guidance_scale(self, pipe: Any) -> float | None:
        """1."""
        return 1.0


class Distilled(Single):
    """One conditional call a step, whose prediction holds its guidance already: FLUX.1.

    A second call of the same latents, before the scheduler has taken the step, is the unconditional half of *true*
    classifier-free guidance. It stands aside: ``eps_u + s (guided - eps_u)`` is the pipeline's own arithmetic.

    Args:
        names: how the denoiser calls what it gets.
        is_scaled: whether the denoiser is told the pipeline's ``guidance_scale``, so that predictions differ by as many
            times; else it is taken for 1.
    """

    def __init__(self, names: Arguments | None = None, *, is_scaled: bool = True) -> None:
        super().__init__(names)
        self.is_scaled = is_scaled

    def is_aside(self, arguments: dict[str, Any], last: Step | None) -> bool:
        """Whether it is the second call of a step."""
        if last is None or last.p is None:
            return False
        call, first = Call(arguments, self.names), last.p.call
        if call.timestep == first.timestep and torch.equal(call.sample, first.sample):
            return True
        raise GuardError(
            "the denoiser is called again with other latents before the scheduler took a step; expected one call, or "
            "two of the same latents, conditional and unconditional. This layout is unknown, so nothing is generated."
        )

    def guidance_scale(self, pipe: Any) -> float | None:
        """The pipeline's, or 1."""
        return CallLayout.guidance_scale(self, pipe) if self.is_scaled else 1.0


def _whole(output: Any) -> Tensor:
    """What a denoiser predicts, learned variances included."""
    whole: Tensor = output[0] if isinstance(output, tuple) else output.sample
    return whole


def is_close(hidden: Tensor, other: Tensor) -> Tensor:
    """(B,) bool, on the CPU: whether (B, L, d) rows are those of another text, once or several times, but for rounding.

    Args:
        hidden: (B, L, d).
        other: (1, l, d).
    """
    if hidden.shape[1] % other.shape[1] or hidden.shape[2] != other.shape[2]:
        return torch.zeros(len(hidden), dtype=torch.bool)
    other = other.to(hidden.device, torch.float32)
    texts = hidden.float().reshape(len(hidden), -1, *other.shape[1:])
    distance: Tensor = torch.linalg.vector_norm(texts - other[:, None], dim=-1)
    found: Tensor = distance <= ROUNDING * torch.linalg.vector_norm(other, dim=-1)[:, None]
    return found.flatten(1).all(1).cpu()


def _repeated(parts: Sequence[tuple[Tensor, int]], like: Tensor) -> Tensor:
    """Each (1, ...) tensor so many times, below each other, in another tensor's dtype and on its device."""
    rows = [value.to(like).expand(count, *value.shape[1:]) for value, count in parts if count]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _rows(value: Any, index: Tensor, batch: int) -> Any:
    """Rows ``index`` of every tensor whose first side is the batch, inside lists, tuples and dicts too."""
    if isinstance(value, Tensor):
        return value[index.to(value.device)] if value.dim() and len(value) == batch else value
    if isinstance(value, dict):
        return {key: _rows(item, index, batch) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_rows(item, index, batch) for item in value)
    return value
