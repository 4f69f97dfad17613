"""Plugins by name: model families, guards, proposers, segmenters and judges.

Built-in plugins are listed here as ``module:attribute`` and imported on first use, so that listing names costs nothing.
Third parties add theirs by entry points of the group ``dagkit.<kind>``, e.g.::

    [project.entry-points."dagkit.judges"]
    mine = "my_package.judge:MyJudge"
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, Literal

from dagkit.errors import PluginError, required

Kind = Literal["families", "guards", "proposers", "segmenters", "judges"]

BUILTIN: Final[dict[Kind, dict[str, str]]] = {
    "families": {
        "flux": "dagkit.models.flux:Flux",
        "flux2-klein": "dagkit.models.flux2:Flux2Klein",
        "pixart": "dagkit.models.dit:PixArt",
        "sana": "dagkit.models.dit:Sana",
        "sd": "dagkit.models.sd:SD",
        "sd3": "dagkit.models.joint:SD3",
        "sdxl": "dagkit.models.sdxl:SDXL",
    },
    "guards": {
        "dag": "dagkit.guard.dag:Guard",
        "sega": "dagkit.guard.peers:SEGAGuard",
        "sld": "dagkit.guard.peers:SLDGuard",
    },
    "proposers": {
        "attention": "dagkit.proposers.attention:AttentionProposer",
        "grounding_dino": "dagkit.proposers.grounding_dino:GroundingDinoProposer",
        "none": "dagkit.proposers.none:NoProposer",
        "nudenet": "dagkit.proposers.nudenet:NudeNetProposer",
        "token": "dagkit.proposers.token:TokenProposer",
    },
    "segmenters": {
        "box": "dagkit.segmenters.box:BoxSegmenter",
        "sam": "dagkit.segmenters.sam:SamSegmenter",
        "sam_hf": "dagkit.segmenters.sam_hf:SamHfSegmenter",
    },
    "judges": {
        "clip": "dagkit.judges.clip:ClipJudge",
        "combined": "dagkit.judges.combined:CombinedJudge",
        "demo": "dagkit.judges.demo:DemoJudge",
        "nudenet": "dagkit.judges.nudenet:NudeNetJudge",
        "safety_checker": "dagkit.judges.safety_checker:SafetyCheckerJudge",
    },
}


BASES: Final[dict[Kind, str]] = {
    "proposers": "dagkit.proposers:Proposer",
    "segmenters": "dagkit.segmenters:Segmenter",
    "judges": "dagkit.judges:Judge",
}
"""What a plugin is a subclass of: the base class says what it must do, may declare, and does where it does not."""


def names(kind: Kind) -> list[str]:
    """All registered names of one kind, sorted; imports none of them."""
    return sorted({*BUILTIN[kind], *(entry.name for entry in _external(kind))})


def load(kind: Kind, name: str) -> Any:
    """Imports one plugin and returns the class or object that it names.

    Raises:
        PluginError: the name is unknown (the message suggests near ones), or registered by two packages, or its module
            does not import, or it does not have the base class of its kind.
        MissingPackage: a library that it needs is not installed.
    """
    external = [entry for entry in _external(kind) if entry.name == name]
    if len(external) + (name in BUILTIN[kind]) > 1:
        owners = [entry.value for entry in external] + ([BUILTIN[kind][name]] if name in BUILTIN[kind] else [])
        raise PluginError(
            f"{name!r} is registered more than once as a {singular(kind)}: {', '.join(owners)}. Uninstall one."
        )
    target = external[0].value if external else BUILTIN[kind].get(name)
    if target is None:
        near = difflib.get_close_matches(name, names(kind), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise PluginError(f"{name!r} is not a {singular(kind)}.{hint} Available: {', '.join(names(kind)) or 'none'}.")
    try:
        found = _attribute(target)
    except (ImportError, AttributeError) as error:
        raise PluginError(
            f"{singular(kind)} {name!r} ({target}) does not import: {error}. Install its extra or fix the package."
        ) from error
    base = BASES.get(kind)
    if base is not None and not (isinstance(found, type) and issubclass(found, _attribute(base))):
        raise PluginError(
            f"{singular(kind)} {name!r} ({target}): expected a subclass of {base.replace(':', '.')}, but it is none. "
            "Update the package that it comes from."
        )
    return found


def _attribute(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(required(module), name)


@cache
def _external(kind: Kind) -> tuple[EntryPoint, ...]:
    """What installed packages add; read once a process, because it opens the metadata of each of them."""
    return tuple(entry_points(group=f"dagkit.{kind}"))


def singular(kind: Kind) -> str:
    """What one of a kind is called."""
    return "family" if kind == "families" else kind[:-1]
