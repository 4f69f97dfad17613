"""A guard that is bound once: what each run costs, what it notices, and threads."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import dagkit
import tiny_pipelines as tiny
from dagkit import demo, models
from dagkit.errors import GuardError
from dagkit.guard import ConceptFound, SLDGuard
from dagkit.models.seal import Seal
from dagkit.token import Thresholds
from guarded import draw, leftovers

ALWAYS = Thresholds(highlight=(1e-6,), edit=(0.0,), min_area=0.0)


@pytest.fixture
def pipe() -> Any:
    return tiny.sd()


def test_each_run_is_as_if_attached_anew(pipe: Any) -> None:
    token = tiny.half_firing(pipe, lambda: draw(pipe))
    with token.guard().attach(pipe) as expected:
        attached = draw(pipe)
    bound = token.guard().bind(pipe)
    for _ in range(2):
        with bound.run() as trace:
            assert torch.equal(draw(pipe), attached)
        assert trace.steps == expected.steps
        assert leftovers(pipe) == 0


def test_a_run_costs_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight is read and no prompt encoded; the time is that of the bundled model, with room for a busy machine."""
    pipe = models.load(demo.model_path()).pipe
    bound = tiny.token(pipe).guard().bind(pipe)
    monkeypatch.setattr("dagkit.models.base.sketch", lambda _: pytest.fail("all weights were read"))
    monkeypatch.setattr(pipe, "encode_prompt", lambda *_, **__: pytest.fail("a prompt was encoded"))
    seconds = []
    for _ in range(50):
        start = time.thread_time()
        with bound.run():
            pass
        seconds.append(time.thread_time() - start)
    assert min(seconds) < 1e-3


def fuse(weight: torch.Tensor) -> None:
    """As PEFT does: object, pointer and version stay."""
    weight.data += 0.05 * torch.randn(len(weight), 1) @ torch.randn(1, weight.shape[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe, layer: fuse(layer.to_k.weight),
        lambda pipe, layer: layer.to_k.weight.mul_(1.1),
        lambda pipe, layer: setattr(layer.to_k, "weight", torch.nn.Parameter(layer.to_k.weight * 1.1)),
        lambda pipe, layer: setattr(layer, "to_k", torch.nn.Linear(*layer.to_k.weight.shape[::-1], bias=False)),
        lambda pipe, layer: setattr(pipe, "text_encoder", tiny.text_encoder()),
        lambda pipe, layer: fuse(next(p for p in pipe.text_encoder.parameters() if p.dim() == 2)),
        lambda pipe, layer: pipe.text_encoder.load_state_dict(tiny.text_encoder().state_dict()),
    ],
    ids=["fused", "in place", "replaced", "other projection", "other encoder", "fused encoder", "loaded"],
)
def test_a_model_that_changed_since_is_refused(pipe: Any, change: Any) -> None:
    token = tiny.token(pipe)
    bound = token.guard().bind(pipe)
    layer = pipe.unet.get_submodule(token.record.layers[0])
    change(pipe, layer)
    with pytest.raises(GuardError, match=r"was made for tiny .*the weights differ by"), bound.run():
        pass
    with bound.guard.bind(tiny.sd()).run():
        pass


def test_another_denoiser_must_be_bound_anew(pipe: Any) -> None:
    bound = tiny.token(pipe).guard().bind(pipe)
    pipe.unet = tiny.unet().requires_grad_(False)
    with pytest.raises(GuardError, match="got another denoiser since the guard was bound"), bound.run():
        pass


def test_a_scheduler_that_tells_no_noise_level_is_refused_when_the_guard_is_bound(pipe: Any) -> None:
    bound = tiny.token(pipe).guard().bind(pipe)
    pipe.scheduler = diffusers.CMStochasticIterativeScheduler()
    with pytest.raises(GuardError, match="CMStochasticIterativeScheduler does not tell how noisy"):
        bound.guard.bind(pipe)
    with pytest.raises(GuardError, match="CMStochasticIterativeScheduler does not tell how noisy"), bound.run():
        pass


def test_what_does_not_change_the_weights_is_no_change(pipe: Any) -> None:
    peft = pytest.importorskip("peft")
    bound = tiny.token(pipe).guard().bind(pipe)
    pipe.scheduler = tiny.scheduler(steps_offset=0)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj", "to_k"]), pipe.text_encoder)
    pipe.text_encoder.requires_grad_(False)
    pipe.text_encoder.to(torch.float64).to(torch.float32)  # as offloading: other memory, same values
    with bound.run() as trace:
        draw(pipe)
    assert trace.steps


def test_a_seal_tells_what_was_moved_from_what_was_written() -> None:
    layer = torch.nn.Linear(64, 64)
    seal = Seal([layer])
    layer.weight.data = layer.weight.data.clone()
    assert seal.is_whole()
    layer.weight.data += 1e-3
    assert not seal.is_whole()


def test_one_thread_at_a_time(pipe: Any) -> None:
    """Each thread draws inside its own run: the second waits, and nothing is mixed."""
    token = tiny.half_firing(pipe, lambda: draw(pipe))
    bound = token.guard().bind(pipe)
    with bound.run() as expected:
        alone = draw(pipe)
    drawn: list[Any] = []

    def work() -> None:
        with bound.run() as trace:
            drawn.append((draw(pipe), trace.steps))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(drawn) == 4
    assert all(torch.equal(images, alone) and steps == expected.steps for images, steps in drawn)
    assert leftovers(pipe) == 0


def test_a_second_run_in_the_same_thread_is_refused(pipe: Any) -> None:
    bound = tiny.token(pipe).guard().bind(pipe)
    with bound.run(), pytest.raises(GuardError, match=r"is guarding .* in this thread already"), bound.run():
        pass
    with bound.run(), SLDGuard("a cat").bind(pipe).run():
        draw(pipe)


def test_two_threads_inside_one_run_are_not_mixed(pipe: Any) -> None:
    """The second thread is refused while the first draws; afterwards it may draw."""
    in_step, go_on, errors = threading.Event(), threading.Event(), []

    def wait(_pipe: Any, step: int, _timestep: int, values: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            in_step.set()
            go_on.wait(20)
        return values

    def first() -> None:
        draw(pipe, callback_on_step_end=wait)

    with tiny.token(pipe, thresholds=ALWAYS).guard().attach(pipe):
        thread = threading.Thread(target=first)
        thread.start()
        in_step.wait(20)
        try:
            draw(pipe)
        except GuardError as error:
            errors.append(str(error))
        pipe.scheduler.set_timesteps(tiny.STEPS)  # what the second one did to it
        go_on.set()
        thread.join()
    assert len(errors) == 1
    assert "is drawing in another thread" in errors[0]


def test_a_run_that_a_guard_stopped_is_over_for_other_threads(pipe: Any) -> None:
    """In mode ``stop``, by one ``attach`` that threads share."""
    stopped: list[bool] = []

    def work() -> None:
        try:
            draw(pipe)
        except ConceptFound:
            stopped.append(True)

    with tiny.token(pipe, thresholds=ALWAYS).guard(mode="stop").attach(pipe):
        for _ in range(2):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    assert stopped == [True, True]


TOKENS = Path(__file__).parents[1] / "tokens"
PROMPTS = [
    "a cat and a bomb on grass",
    "a knife and a cup on sand",
    "a dog and a cup on snow",
    "a cup and a book on water",
]


def test_a_token_of_the_version_before_guards_as_it_did() -> None:
    """``tokens/weapon`` has schema 1; ``weapon-guarded.png`` was drawn with the version that wrote it."""
    pipe, token = models.load(demo.model_path()).pipe, dagkit.load_token(TOKENS / "weapon")
    assert json.loads((TOKENS / "weapon" / "token.json").read_bytes())["schema_version"] == 1
    assert token.record.thresholds.levels == (0.1, 0.3, 0.5, 0.7, 0.85, 0.93)
    assert (token.record.guidance.max_level, token.record.guidance.max_step) == (0.77, 0.255)
    bound, rows = token.guard().bind(pipe), []
    for negative, firing in ((None, [True, True, False, False]), (["a weapon"] * 4, [True, True, True, False])):
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        settings = {"num_inference_steps": 20, "guidance_scale": 5.0, "width": 64, "height": 64}
        with bound.run() as trace:
            images = pipe(PROMPTS, negative_prompt=negative, generator=generators, **settings).images
        assert [trace.summary(sample)["is_firing"] for sample in range(4)] == firing
        rows.append(np.concatenate([np.asarray(image) for image in images], 1))
    with Image.open(TOKENS / "weapon-guarded.png") as golden:
        difference = np.abs(np.concatenate(rows).astype(int) - np.asarray(golden).astype(int))
    assert difference.max() <= 2  # other machines round otherwise; here all are equal
