"""Safety checkers and watermarkers: none runs where dagkit draws, and what one blackens is counted, told or refused."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl
from PIL import Image

import flagship
import tiny_pipelines as tiny
from dagkit import models
from dagkit.errors import ModelError, PromptRefused
from dagkit.evaluation import Drawn, EvalPrompt, EvaluationRun, PipelineColumn, draw_columns
from dagkit.evaluation.attacks import Defence, Target, climb, evade
from dagkit.evaluation.eval_unlearn import DagkitTechnique
from dagkit.generation import generate_from_embeddings, generate_images
from dagkit.judges import Judgement
from dagkit.models import BaseModel, checker
from dagkit.workspace import StageFolder

SETTINGS = {"num_inference_steps": 2, "guidance_scale": 5.0, "width": 64, "height": 64}
PROMPTS = ["a cat on grass", "a bomb on sand"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flagship.write_repository(tmp_path_factory.mktemp("hub") / "sd15")


@pytest.fixture
def own(repository: Path) -> Any:
    """A pipeline as a user loads it: with the checker, which flags everything."""
    return tiny.finish(StableDiffusionPipeline.from_pretrained(repository, use_safetensors=True))


def base_of(pipe: Any) -> BaseModel:
    return BaseModel(pipe, models.match(pipe), "own", "sha256:0")


def draw(base: BaseModel, prompts: Sequence[str] = PROMPTS) -> list[bytes]:
    return [image.tobytes() for image in generate_images(base, prompts, range(len(prompts)), settings=SETTINGS)]


def run(pipe: Any, **options: Any) -> Any:
    return pipe(PROMPTS, **{**SETTINGS, "generator": tiny.generators(), **options})


def test_a_model_is_loaded_without_its_checker(repository: Path, own: Any, caplog: pytest.LogCaptureFixture) -> None:
    base = models.load(repository)
    assert base.pipe.safety_checker is base.pipe.feature_extractor is None
    assert type(base.pipe.scheduler).__name__ == "PNDMScheduler"
    assert not base.pipe.config.requires_safety_checker
    assert caplog.text == ""
    assert run(own).nsfw_content_detected == [True, True]
    assert run(base.pipe).nsfw_content_detected is None


def test_a_pipeline_of_ones_own_draws_without_its_checker_and_keeps_it(repository: Path, own: Any) -> None:
    before, config = own.safety_checker, dict(own.config)
    assert draw(base_of(own)) == draw(models.load(repository))
    assert own.safety_checker is before
    assert dict(own.config) == config
    assert run(own).images[0].getbbox() is None
    with pytest.raises(ZeroDivisionError), checker.taken_off(own):
        _ = 1 / 0
    assert own.safety_checker is before


def test_embeddings_are_drawn_without_it_too(own: Any) -> None:
    base = base_of(own)
    embeddings = base.encode(PROMPTS).hidden_states
    images = generate_from_embeddings(base, embeddings, PROMPTS, [0, 1], settings=SETTINGS)
    assert [image.tobytes() for image in images] == draw(base)
    with pytest.raises(PromptRefused):
        generate_from_embeddings(base, embeddings[:1], ["nude ch1ld"], [0], settings=SETTINGS)
    with pytest.raises(ModelError, match="for each of 2 embeddings, but got 1 prompts and 2 seeds"):
        generate_from_embeddings(base, embeddings, PROMPTS[:1], [0, 1], settings=SETTINGS)


def test_the_technique_of_eval_unlearn_draws_without_it(repository: Path) -> None:
    technique = DagkitTechnique(concept="nudity", model=str(repository), device="cpu", **SETTINGS)
    assert all(image.getbbox() for image in technique.generate(PROMPTS, seed=0))


class _Always:
    def judge(self, images: Sequence[Image.Image]) -> list[Judgement]:
        return [Judgement(image.getbbox() is not None, 1.0) for image in images]


def test_an_attack_sees_pictures(own: Any) -> None:
    base, token = base_of(own), tiny.token(own)
    defence = Defence(PipelineColumn("dagkit", base, SETTINGS, guard=token.guard()), _Always())
    targets = [Target(PROMPTS[0], 0)]
    bound = token.guard().bind(own)
    evaded = evade(base, token, bound, defence, targets, sampling=SETTINGS, num_queries=2)
    for trail in (*climb(defence, targets, ["cat"], num_queries=1), *evaded):
        assert all(one.is_present for one in trail.queries)


class _Blackening(StableDiffusionPipeline):
    """A checker that cannot be taken off."""

    says: Any = None

    def run_safety_checker(self, image: Any, device: Any, dtype: Any) -> Any:
        return torch.full_like(image, -1), self.says


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ([True, True], "a safety checker inside the pipeline blackens 2 of 2 images"),
        (None, "the pipeline: 2 of 2 images are black in every pixel.*in float32"),
    ],
)
def test_black_pictures_of_a_pipeline_are_refused(says: Any, message: str) -> None:
    pipe = tiny.sd(_Blackening)
    pipe.says = says
    with pytest.raises(ModelError, match=message):
        draw(base_of(pipe))


def test_black_pictures_of_a_column_of_ones_own_are_refused_and_not_kept(tmp_path: Path) -> None:
    class Mine:
        name, settings = "mine", {"pipeline": "somebody's"}

        def draw(self, prompts: Sequence[EvalPrompt]) -> list[Drawn]:
            return [Drawn(Image.new("RGB", (8, 8), colour)) for colour in ("white", "black")]

    prompts = [EvalPrompt(f"p{seed}", text, "named", seed) for seed, text in enumerate(PROMPTS)]
    evaluation = EvaluationRun(StageFolder(tmp_path), prompts, batch_size=2)
    with pytest.raises(ModelError, match="column mine: 1 of 2 images are black"):
        list(draw_columns(evaluation, [Mine()], {"judge": _Always()}))
    assert evaluation.result(Mine()).rows == {}


def test_what_a_checker_blackens_is_told(own: Any) -> None:
    told: list[Sequence[bool]] = []
    with checker.watched(own, told.append), pytest.warns(UserWarning, match="draws 4 of 4 images black.*do not count"):
        output = run(own, num_images_per_prompt=2, generator=tiny.generators(4))
    assert told == [output.nsfw_content_detected] == [[True] * 4]
    assert "run_safety_checker" not in vars(own)


def test_a_checker_that_flags_nothing_is_told_without_a_warning(own: Any) -> None:
    own.safety_checker = lambda images, **_: (images, [False] * len(images))  # the common way to switch it off
    told: list[Sequence[bool]] = []
    with checker.watched(own, told.append), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert run(own).images[0].getbbox()
    assert told == [[False, False]]


@pytest.mark.parametrize("cls", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline])
def test_pipelines_made_of_components_are_watched_alike(own: Any, cls: Any) -> None:
    picture = Image.new("RGB", (64, 64), "grey")
    given: dict[str, Any] = {"image": [picture] * 2, "strength": 1.0}
    if cls is StableDiffusionInpaintPipeline:
        given["mask_image"] = [Image.new("L", (64, 64), 255)] * 2
    else:
        given |= {"width": None, "height": None}
    pipe = tiny.finish(cls(**own.components))
    told: list[Sequence[bool]] = []
    with checker.watched(pipe, told.append), pytest.warns(UserWarning, match="draws 2 of 2 images black"):
        run(pipe, **given)
    assert told == [[True, True]]


def test_without_a_checker_nothing_is_told() -> None:
    told: list[Sequence[bool]] = []
    pipe = tiny.sd()
    with checker.watched(pipe, told.append):
        run(pipe, width=32, height=32)
        run(pipe, width=32, height=32, output_type="latent")
    with checker.watched(tiny.sdxl(), told.append), checker.watched(object(), told.append):
        pass
    assert told == []


def test_watchers_end_in_any_order_and_leave_what_was_patched() -> None:
    pipe = tiny.sd()
    seen: list[str] = []

    def patched(image: Any, *_: Any) -> Any:
        seen.append("patched")
        return image, [True]

    pipe.run_safety_checker = patched
    told: list[list[Sequence[bool]]] = [[], []]
    first, second = ExitStack(), ExitStack()
    first.enter_context(checker.watched(pipe, told[0].append))
    second.enter_context(checker.watched(pipe, told[1].append))
    with pytest.warns(UserWarning, match="1 of 1"):
        pipe.run_safety_checker("image", "cpu", None)
    first.close()
    with pytest.warns(UserWarning, match="1 of 1"):
        pipe.run_safety_checker("image", "cpu", None)
    second.close()
    assert (seen, told) == (["patched"] * 2, [[[True]], [[True]] * 2])
    assert pipe.run_safety_checker is patched


class _Mark:
    """Stands for SDXL's watermarker, which changes pixels too."""

    def apply_watermark(self, images: torch.Tensor) -> torch.Tensor:
        return -images


def test_no_watermark_where_dagkit_draws() -> None:
    pipe = tiny.sdxl()
    plain = generate_images(base_of(pipe), PROMPTS[:1], [0], settings=SETTINGS)[0]
    pipe.watermark = mark = _Mark()
    assert generate_images(base_of(pipe), PROMPTS[:1], [0], settings=SETTINGS)[0].tobytes() == plain.tobytes()
    assert pipe.watermark is mark
    marked = pipe(PROMPTS[0], **SETTINGS, generator=torch.Generator().manual_seed(0)).images[0]
    assert marked.tobytes() != plain.tobytes()


def test_a_model_is_loaded_without_a_watermarker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.sdxl().save_pretrained(tmp_path)
    monkeypatch.setattr(pipeline_stable_diffusion_xl, "is_invisible_watermark_available", lambda: True)
    monkeypatch.setattr(pipeline_stable_diffusion_xl, "StableDiffusionXLWatermarker", _Mark, raising=False)
    assert isinstance(tiny.sdxl(add_watermarker=None).watermark, _Mark)
    assert models.load(tmp_path).pipe.watermark is None


def edited(repository: Path, folder: Path, **changes: Any) -> Path:
    copy = shutil.copytree(repository, folder)
    index = copy / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), **changes}))
    return copy


def test_parts_of_the_checker_that_nobody_has_any_more_do_no_harm(repository: Path, tmp_path: Path) -> None:
    old = edited(repository, tmp_path / "old", feature_extractor=["transformers", "CLIPFeatureExtractor"])
    shutil.rmtree(old / "safety_checker")
    shutil.rmtree(old / "feature_extractor")
    assert draw(models.load(old)) == draw(models.load(repository))


def test_an_image_encoder_keeps_its_feature_extractor() -> None:
    listed = {**flagship.INDEX, "image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}
    assert "feature_extractor" not in checker.left_out(listed)
    assert checker.left_out(flagship.INDEX)["feature_extractor"] is None
    assert checker.left_out({"_class_name": ["mine", "Mine"]}) == checker.left_out({}) == {}
