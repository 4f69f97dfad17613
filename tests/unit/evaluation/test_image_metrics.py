from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics
import torchvision
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from dagkit import demo, evaluation
from dagkit.errors import CheckpointError, PluginError
from dagkit.evaluation import image_metrics, load_image_metrics
from dagkit.evaluation.image_metrics import ClipScore, Frechet, InceptionFeatures, Lpips, Pair
from dagkit.judges.demo import DemoJudge
from dagkit.judges.nudenet import NudeNetJudge
from scene_columns import scene_columns, scene_run

NUM = 3


def pairs(size: int = 64) -> list[Pair]:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (size, size, 3)).astype(np.uint8)) for _ in range(2 * NUM)]
    texts = ["a cat on grass", "a dog", "a very long prompt " * 30]
    return [Pair(text, *images[2 * index : 2 * index + 2]) for index, text in enumerate(texts)]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's own classes, small and with random weights, over the bundled world's words."""
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"vocab_size": 512, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(CLIPConfig(text_config={**tower, **ids}, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokenizer = CLIPTokenizer.from_pretrained(demo.model_path() / "tokenizer", model_max_length=16)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_is_the_cosine_of_clips_two_towers(clip: Path) -> None:
    (metric,) = load_image_metrics([f"clip_score={clip}"], {})
    rows = metric.rows(pairs())
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    for row, pair in zip(rows, pairs(), strict=True):
        inputs = processor(text=[pair.text], images=[pair.after], return_tensors="pt", truncation=True)
        with torch.no_grad():
            expected = 100 * float(model(**inputs).logits_per_image / model.logit_scale.exp())
        assert row == pytest.approx(max(expected, 0), abs=1e-3)
    estimate = metric.estimate(rows, rows)
    assert estimate.value == pytest.approx(rows.mean())
    assert estimate.total == NUM


def alexnet() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    features = torchvision.models.alexnet().features
    return {f"features.{name}": value for name, value in features.state_dict().items()}


def test_lpips_is_its_formula_on_alexnets_features(tmp_path: Path) -> None:
    weights = alexnet()
    torch.save(weights, tmp_path / "alexnet.pth")
    (metric,) = load_image_metrics([f"lpips={tmp_path}/alexnet.pth"], {})
    layers = torchvision.models.alexnet().features.eval()
    layers.load_state_dict({name.removeprefix("features."): value for name, value in weights.items()})
    path = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/alex.pth"
    heads = torch.load(path, map_location="cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    def taps(image: Image.Image) -> list[torch.Tensor]:
        x = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1)
        x, found = ((x - shift) / scale).permute(2, 0, 1)[None], []
        for index, layer in enumerate(layers):
            x = layer(x)
            if index in (1, 4, 7, 9, 11):
                found.append(x / x.square().sum(1, keepdim=True).sqrt().clamp_min(1e-8))
        return found

    with torch.no_grad():
        for row, pair in zip(metric.rows(pairs()), pairs(), strict=True):
            expected = sum(
                float((heads[f"lin{k}.model.1.weight"] * (a - b) ** 2).sum(1).mean())
                for k, (a, b) in enumerate(zip(taps(pair.before), taps(pair.after), strict=True))
            )
            assert row == pytest.approx(expected, rel=1e-4)
    same = metric.rows([Pair("", pairs()[0].before, pairs()[0].before)])
    assert same == pytest.approx(0)


def test_fid_runs_on_the_exact_inception_network(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    torch.manual_seed(2)
    buffer = io.BytesIO()
    with monkeypatch.context() as patch:  # a network that keeps its random weights
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        network = inception.FeatureExtractorInceptionV3("random", ["2048"])
    torch.save(network.state_dict(), buffer)
    metric = Frechet(InceptionFeatures(buffer.getvalue()), "fid", {})
    rows = metric.rows(pairs())
    assert rows.shape == (NUM, 2048)
    images = torch.stack([torch.from_numpy(np.array(pair.after)).permute(2, 0, 1) for pair in pairs()])
    assert rows == pytest.approx(network(images)[0].numpy(), abs=1e-5)
    assert metric.estimate(rows, rows).value == pytest.approx(0, abs=1e-6)


class _Other:
    """Something that a file of weights must not hold."""


def test_frechet_is_named_after_the_judge_whose_features_it_compares(tmp_path: Path) -> None:
    columns, judge = scene_columns(), DemoJudge.from_concept()
    run = scene_run(tmp_path, 6, columns)
    wanted = load_image_metrics(["frechet", "ssim"], {"demo": judge})
    figures = evaluation.compute(run, columns, judge="demo", unsafe=["bomb"], image_metrics=wanted)
    named = figures["results"]["named"]
    assert "frechet_demo" not in named["none"]
    assert named["dagkit"]["frechet_demo"]["value"] > 0
    assert figures["results"]["safe"]["dagkit"]["frechet_demo"]["value"] == pytest.approx(0, abs=1e-9)
    assert named["dagkit"]["frechet_demo"]["total"] == 6
    assert judge.features([Image.new("RGB", (64, 64))] * 2).shape == (2, 224)


@pytest.mark.parametrize("metric", ["fid", "lpips"])
def test_missing_weights_say_where_they_are_published(
    metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = {"fid": image_metrics.INCEPTION_URL, "lpips": image_metrics.ALEXNET_URL}[metric]
    with pytest.raises(CheckpointError, match=f"metric {metric}: its network's weights are not at {tmp_path}") as error:
        load_image_metrics([metric], {})
    assert f"Download {url}" in str(error.value)
    assert f"--metrics {metric}=FILE" in str(error.value)


def test_what_cannot_be_measured_is_named(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"'fdi' is not a metric of images. Available: clip_score, fid, frechet"):
        load_image_metrics(["fdi"], {})
    with pytest.raises(CheckpointError, match=r"metric clip_score: .*none cannot be loaded.*--metrics clip_score=FOLD"):
        load_image_metrics([f"clip_score={tmp_path}/none"], {})
    with pytest.raises(PluginError, match="the judge nudenet has no features to compare"):
        Frechet.of_judge("nudenet", NudeNetJudge.__new__(NudeNetJudge))
    other = tmp_path / "other.pth"
    torch.save({"x": torch.zeros(1)}, other)
    with pytest.raises(CheckpointError, match=r"is not the standard Inception network: expected a SHA-256 that begins"):
        load_image_metrics([f"fid={other}"], {})
    with pytest.raises(CheckpointError, match="expected torchvision's AlexNet weights"):
        load_image_metrics([f"lpips={other}"], {})
    torch.save({"x": _Other()}, other)
    with pytest.raises(CheckpointError, match="expected torchvision's AlexNet weights"):
        Lpips.load(str(other), "cpu")
    with pytest.raises(CheckpointError, match="expected the Inception network's weights"):
        InceptionFeatures(other.read_bytes())
    assert ClipScore.name == "clip_score"
