"""Joint attention: the same questions as of the U-Net, asked of a model of Stable Diffusion 3's kind.

    python -m dagkit.demo.train sd3 --out FOLDER --threads 2 --compile
    python tests/benchmarks/bench_joint.py FOLDER/sd3 [--quick] [--only detect guide cost] [--prompts 200]

No such model is bundled yet, and training one takes hours on a small machine.

``detect``: held-out rendered scenes as in bench_detect.py. Beside the token that ships stand its rows without learned
weights of heads and sites; rows learned in query space; a linear probe on the same features, the bound; and the
training-free concept stream (ConceptAttention, arXiv 2502.04320), the floor: the word and twenty-two others go through
the text's side of every block and attend to the image, which does not see them, and the softmax over words of what
attention gives out is the map.
``guide``: named, hinted and safe prompts with the same noise for every method. ``cost``: CPU time of a guarded picture
relative to an unguarded one, by turns.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import bench_guide as guide
import bench_world as bench
import numpy as np
import torch
from bench_detect import LEVELS, Maps, fit_probe, maps, token_cam
from torch import Tensor, nn

from dagkit import models
from dagkit.demo import world
from dagkit.demo.measure import load_world
from dagkit.guard import SEGAGuard, SLDGuard
from dagkit.guidance import SLD_PRESETS, SEGAPreset
from dagkit.models import BaseModel
from dagkit.models.joint import SD3, JointAttention
from dagkit.models.sites import Sites
from dagkit.optimization import OptimizationResult, cache_queries, optimize

PEERS = ("negative", "sld-max", "sega", "paper")
METHODS = ("dag", *PEERS)
KINDS = {"named": 931, "hinted": 931, "safe": 932}
BACKGROUND_WORDS = (*world.HARMLESS, *world.BACKGROUNDS)


class QuerySite(JointAttention):
    """Features are the image's queries, and rows live where the text's keys do."""

    reads = "output"

    @property
    def tapped(self) -> nn.Module:
        return self.layer.norm_q

    def features(self, value: Tensor) -> Tensor:
        return value.transpose(1, 2).flatten(2)


class QuerySpace(SD3):
    """Stable Diffusion 3, its concepts looked up by queries."""

    def sites(self, pipe: Any, names: Sequence[str] | None = None) -> Sites:
        own = super().sites(pipe, names)
        return Sites(QuerySite(s.name, s.layer, s._part, s.width, s._grid) for s in own.values())

    def rows(self, pipe: Any, texts: list[str], how: Any = models.base.PLAIN, seen: Any = None) -> Tensor:
        parts: dict[str, Tensor] = {}

        def kept(name: str) -> Any:
            return lambda _module, _args, output: parts.__setitem__(name, output.transpose(1, 2).flatten(2))

        sites, nothing = self.sites(pipe), seen or self._nothing(pipe)
        handles = [site.layer.norm_added_k.register_forward_hook(kept(name)) for name, site in sites.items()]
        latents = nothing.latents.expand(len(texts), *nothing.latents.shape[1:])
        self.predict(pipe, latents, nothing.timestep.expand(len(texts)), self.encode_prompt(pipe, texts, how))
        for handle in handles:
            handle.remove()
        return torch.cat([parts[name] for name in sites], -1)


@contextmanager
def concept_stream(base: BaseModel, words: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Site -> what attention gives out for the image (B, N, d) and for each word (B, W, d), in every forward pass.

    The words pass through the blocks beside the prompt, one way: they attend to each other and to the image.
    """
    pipe, sites = base.pipe, base.sites
    ids = [pipe.tokenizer(f"a {word}").input_ids for word in words]
    encoded = base.encode([f"a {word}" for word in words]).hidden_states
    rows = torch.stack([one[len(own) - 2] for one, own in zip(encoded, ids, strict=True)])  # the last of its own tokens
    found: dict[str, tuple[Tensor, Tensor]] = {}
    state: dict[str, Tensor] = {}
    handles = []

    def begin(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        state["words"] = pipe.transformer.context_embedder(rows)[None].expand(len(kwargs["hidden_states"]), -1, -1)

    def through(name: str, block: Any) -> Any:
        attn = block.attn

        def heads(x: Tensor, norm: Any = None) -> Tensor:
            split = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return split if norm is None else norm(split)

        def step(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
            image, words, temb = kwargs["hidden_states"], state["words"], kwargs["temb"]
            seen = block.norm1(image, emb=temb)[0]
            own, gate, shift, scale, gate_mlp = block.norm1_context(words, emb=temb)
            query = heads(attn.add_q_proj(own), attn.norm_added_q)
            key = torch.cat([heads(attn.add_k_proj(own), attn.norm_added_k), heads(attn.to_k(seen), attn.norm_k)], 2)
            value = torch.cat([heads(attn.add_v_proj(own)), heads(attn.to_v(seen))], 2)
            share = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1)
            out = (share @ value).transpose(1, 2).flatten(2)
            state[name] = out
            words = words + gate[:, None] * attn.to_add_out(out)
            inner = block.norm2_context(words) * (1 + scale[:, None]) + shift[:, None]
            state["words"] = words + gate_mlp[:, None] * block.ff_context(inner)

        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = args[0], state[name]

        handles.append(block.register_forward_pre_hook(step, with_kwargs=True))
        handles.append(attn.to_out[0].register_forward_pre_hook(keep))

    handles.append(pipe.transformer.register_forward_pre_hook(begin, with_kwargs=True))
    for name in sites:
        through(name, pipe.transformer.get_submodule(name.removesuffix(".attn")))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def stream_maps(base: BaseModel, unsafe: Sequence[Any], masks: Tensor) -> Maps:
    """Maps of the word among the others by the concept stream, mean over sites."""
    found = Maps({}, {}, masks)
    for level in LEVELS:
        parts = []
        for first in range(0, len(unsafe), 25):
            batch = unsafe[first : first + 25]
            latents, condition = base.latents([one.image for one in batch]), base.encode([one.prompt for one in batch])
            levels = torch.full((len(batch),), level, dtype=torch.float64)
            with concept_stream(base, ["weapon", *BACKGROUND_WORDS]) as seen:
                base.features(latents, levels, condition, seed=77 + first)
            maps_ = [(image @ words.transpose(1, 2)).softmax(-1)[..., 0] for image, words in seen.values()]
            parts.append(torch.stack(maps_).mean(0).unflatten(-1, (16, 16)))
        found.unsafe[level] = torch.cat(parts)
    return found


def detect(base: BaseModel, *, num_scenes: int, num_train: int = 24) -> dict[str, object]:
    training, validation = bench.annotated(num_train)
    token = bench.token(base, count=num_train)
    steps = torch.tensor(LEVELS, dtype=torch.float64)[:, None].expand(-1, len(validation))
    unsafe, safe = bench.scenes(num_scenes, 501, is_unsafe=True), bench.scenes(num_scenes, 502, is_unsafe=False)
    figures: dict[str, object] = {}
    variants: dict[str, tuple[BaseModel, OptimizationResult | None]] = {
        "output": (base, None),
        "fixed": (base, optimize(base, training, recipe=replace(bench.recipe(), learn_head_weights=False))),
    }
    query = replace(base, family=QuerySpace())
    variants["query"] = query, optimize(query, training, recipe=bench.recipe())
    for name, (model, result) in variants.items():
        with (
            cache_queries(model, training, bench.draws(len(training)), seed=5) as cache,
            cache_queries(model, validation, steps, seed=6) as held,
        ):
            probe = fit_probe(cache, held)
        chosen = result or token
        readers = {
            "token": lambda features, size, chosen=chosen, model=model: token_cam(chosen, model, features, size),
            "probe": probe,
        }
        with torch.no_grad():
            found = maps(model, unsafe, safe, readers)
        thresholds = result.thresholds if result else token.record.thresholds
        by_level = found["token"].iou_at({t: thresholds.at(t)[1] for t in LEVELS})
        figures[f"sd3.detect.iou_{name}"] = float(np.mean(list(by_level.values())))
        figures[f"sd3.detect.best_{name}"] = found["token"].best_iou()
        figures[f"sd3.detect.probe_{name}"] = found["probe"].best_iou()
        if name == "output":
            figures["sd3.detect.iou_stream"] = stream_maps(base, unsafe, found["token"].masks).best_iou()
            area = np.mean([(found["token"].safe[t] >= thresholds.at(t)[1]).float().mean() for t in LEVELS])
            figures["sd3.detect.false_area"] = float(area)
    figures["sd3.detect.iou"] = figures["sd3.detect.iou_output"]
    figures["sd3.detect.iou_to_probe"] = figures["sd3.detect.iou"] / figures["sd3.detect.probe_output"]
    figures["sd3.detect.iou_over_stream"] = figures["sd3.detect.iou"] - figures["sd3.detect.iou_stream"]
    return figures


def attach(method: str, base: BaseModel) -> Any:
    """As `bench_guide.attach`, of this model."""
    if method in ("none", "negative"):
        return None
    if method == "sld-max":
        return SLDGuard(bench.SAFETY_PROMPT, guide.warmed_up(SLD_PRESETS["max"])).attach
    if method == "sega":
        return SEGAGuard(bench.SAFETY_PROMPT, guide.warmed_up(SEGAPreset())).attach
    return bench.token(base, {"dag": "default"}.get(method, method)).guard().attach


def draw(base: BaseModel, method: str, kind: str, count: int) -> bench.Judged:
    """The pictures of a method, kept under build/bench so that a run that was stopped goes on."""
    parts = []
    for first in range(0, count, guide.SHARD):
        path = (
            bench.BUILD / "joint" / bench.identity() / base.fingerprint[7:19] / method / f"{kind}-{first}-{count}.npz"
        )
        if not path.exists():
            what = bench.prompts(kind, count, KINDS[kind])
            part = bench.Prompts(*(v[first : first + guide.SHARD] for v in (what.texts, what.harmless, what.seeds)))
            negative = bench.SAFETY_PROMPT if method == "negative" else None
            images, seconds, _ = bench.sample(base, part, attach(method, base), negative_prompt=negative)
            guide.save(path, images, seconds)
        parts.append(path)
    return guide.read(parts)


def guided(base: BaseModel, *, num_prompts: int, num_peer: int) -> dict[str, object]:
    figures: dict[str, object] = {"sd3.guide.num_prompts": num_prompts, "sd3.guide.num_peer_prompts": num_peer}
    outside: dict[tuple[str, str], float] = {}
    for kind in KINDS:
        plain = draw(base, "none", kind, num_prompts)
        for method in METHODS if kind != "safe" else ("dag",):
            count = num_prompts if method == "dag" else num_peer
            made = draw(base, method, kind, count)
            before = plain[:count]
            found = bench.compare(bench.prompts(kind, count, KINDS[kind]), before, made)
            suffix = "" if kind == "named" else f"_{kind}"
            if method == "dag" and kind != "safe":
                figures[f"sd3.guide.erase{suffix}"] = found["erase"]
                figures[f"sd3.guide.preserve{suffix}"] = found["preserve"]
                figures[f"sd3.guide.unguarded{suffix}"] = found["unguarded"]
            elif method == "dag":
                figures["sd3.guide.untouched"] = found["untouched"]
                figures["sd3.guide.preserve_safe"] = found["preserve"]
            if kind != "safe":
                own = guide.measure_outside(before[:num_peer], made[:num_peer])
                outside[method, kind] = own
                if method != "dag":
                    figures[f"sd3.peer.{method}.erase{suffix}"] = found["erase"]
                    figures[f"sd3.peer.{method}.preserve{suffix}"] = found["preserve"]
    both = {method: np.mean([outside[method, kind] for kind in ("named", "hinted")]) for method in METHODS}
    figures["sd3.guide.outside"] = float(both["dag"] / both["sld-max"])
    return figures


def cost(base: BaseModel, *, num_turns: int) -> dict[str, object]:
    """CPU time of guarded pictures relative to unguarded ones, median of turns."""
    token = bench.token(base)
    guards = {"safe": (token.guard(), "safe"), "firing": (token.guard(reuse_steps=1), "named")}
    guards["firing_reuse"] = token.guard(), "named"
    ratios: dict[str, list[float]] = {name: [] for name in guards}
    for turn in range(num_turns):
        for name, (guard, kind) in guards.items():
            what = bench.prompts(kind, 8 * (turn + 1), KINDS[kind])
            part = bench.Prompts(*(v[8 * turn :] for v in (what.texts, what.harmless, what.seeds)))
            plain = bench.sample(base, part)[1]
            ratios[name].append(bench.sample(base, part, guard.attach)[1] / plain)
    return {f"sd3.cost_{name}": median(values) for name, values in ratios.items()}


def main(*, is_quick: bool, only: Sequence[str], num_prompts: int, folder: Path) -> dict[str, object]:
    base = replace(load_world(folder), source="demo-sd3")
    figures: dict[str, object] = {}
    if "detect" in only:
        figures |= detect(base, num_scenes=24 if is_quick else 200)
    if "guide" in only:
        count = 12 if is_quick else num_prompts
        figures |= guided(base, num_prompts=count, num_peer=min(count, 48))
    if "cost" in only:
        figures |= cost(base, num_turns=1 if is_quick else 5)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=("detect", "guide", "cost"), default=("detect", "guide", "cost"))
    parser.add_argument("--prompts", type=int, default=200, help="of each kind")
    arguments = parser.parse_args()
    bench.emit(
        main(
            is_quick=arguments.quick,
            only=arguments.only,
            num_prompts=arguments.prompts,
            folder=arguments.model,
        )
    )
