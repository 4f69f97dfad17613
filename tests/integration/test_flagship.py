"""The concept ``nudity`` on a repository like the real Stable Diffusion 1.5 on the Hub, from generate to publish.

Its safety checker flags every picture. So each picture that is not black, on disk or under a judge, was drawn without.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
from label_studio_server import api
from PIL import Image

import flagship
import tiny_pipelines as tiny
from dagkit import models
from dagkit.concept import Concept, load_concept
from dagkit.errors import ModelError
from dagkit.labelstudio.server import Login
from dagkit.workspace import StageFolder, Workspace
from drawn_workspace import annotate
from interruption import finish
from loopback_hub import LoopbackHub

pytestmark = pytest.mark.slow

SIDE_PX = 128
NUM_IMAGES = 12
PROMPTS = ("a photo of a nude adult person, at a lake", "a photo of a fully clothed adult man, in a forest")
PLUGINS = {
    "[nudenet, attention]": "[nudenet, {name: attention, min_score: 0}]",  # a model of random weights is never sure
    "{name: sam, model_type: vit_h}": "{name: sam, model_type: vit_tiny, checkpoint: demo}",
}
SAMPLING = f"sampling: {{num_inference_steps: 4, guidance_scale: 7.5, width: {SIDE_PX}, height: {SIDE_PX}}}\n"
FETCHED = {
    "model_index.json",
    "feature_extractor/preprocessor_config.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


@pytest.fixture
def place(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in: the repository on a Hub, ``nudity`` with small pictures, nothing in the user's cache."""
    repository = flagship.write_repository(tmp_path / "repository")
    flagship.upload(hub, repository)
    flagship.upload(hub, flagship.write_checker(tmp_path / "checker"), flagship.CHECKER)
    home = tmp_path / "work"
    (home / "annotation_configs").mkdir(parents=True)
    text = Path("annotation_configs/nudity.yaml").read_text()
    for old, new in PLUGINS.items():
        assert old in text
        text = text.replace(old, new)
    (home / "annotation_configs" / "nudity.yaml").write_text(text + SAMPLING)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.chdir(home)
    return home


def fetched(hub: LoopbackHub, name: str = flagship.NAME) -> list[str]:
    """Files of a repository that were sent, and forgets all requests."""
    start = f"GET /{name}/resolve/"
    sent = [one.removeprefix(start).partition("/")[2] for one in hub.requests if one.startswith(start)]
    hub.requests.clear()
    return sorted(sent)


def colours(folder: StageFolder) -> list[int]:
    """Of each image of a manifest, how many."""
    images = [Image.open(folder.path / row["image"]).convert("RGB") for row in folder.rows()]
    assert all(image.size == (SIDE_PX, SIDE_PX) for image in images)
    return [len(image.getcolors(SIDE_PX**2) or ()) for image in images]


def answer(workspace: Workspace, concept: Concept) -> None:
    """What annotators say: a body fills each picture of an unsafe prompt, the others show none."""
    for row in workspace.stage("candidates", concept.name).rows():
        mask = {concept.labels.positive[0]: np.ones((SIDE_PX, SIDE_PX), bool)}
        state, masks = ("empty", {}) if row["kind"] == "safe" else ("accepted", mask)
        annotate(workspace, concept, row["key"], state, masks=masks, annotators=["annotator-1"])


def run_alone(hub: LoopbackHub, *arguments: object) -> subprocess.CompletedProcess[str]:
    """``dagkit ARGUMENTS`` as a user runs it, in a process of its own."""
    cache = huggingface_hub.constants.HF_HUB_CACHE
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": cache, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "dagkit.cli", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_every_command_of_nudity(hub: LoopbackHub, place: Path, cache: Path) -> None:
    runs, concept, where = Workspace(Path("runs")), load_concept("nudity"), ["--concept", "nudity", "--quiet"]
    assert f"base model: {flagship.NAME}" in finish("concept", "show", "nudity")

    done = run_alone(hub, "generate", *where, "--num-images", NUM_IMAGES)
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"{flagship.NAME} is downloaded from the Hub, once. This can take minutes.\n"
    assert fetched(hub) == sorted(FETCHED)
    assert min(colours(runs.stage("candidates", "nudity"))) > 100

    hub.broken = "."  # whoever has the model in the cache needs no Hub
    again = finish("generate", *where, "--num-images", NUM_IMAGES)
    assert again.startswith(f"generate: 0 images drawn, {NUM_IMAGES} were there already")
    finish("premask", *where)
    assert all(row["masks"] for row in runs.stage("premasks", "nudity").rows() if row["score"])
    answer(runs, concept)
    finish("export", "--concept", "nudity")
    finish(
        "optimize", *where, "--num-steps", 20, "--tune", 0, "--recipe", "paper"
    )  # which asks no more of a model that knows nothing
    hub.broken = None

    assert "nudity@1.0.0" in finish("token", "show", "nudity@1.0.0")
    finish("token", "verify", "nudity@1.0.0", "--model", flagship.NAME)
    finish("sample", "--guard", "nudity@1.0.0", "--compare", "--quiet", *PROMPTS)
    assert min(colours(runs.stage("samples", "nudity"))) > 100
    guarded = [row for row in runs.stage("samples", "nudity").rows() if row["column"] == "guarded"]
    assert [row["guards"][0]["num_steps"] for row in guarded] == [5, 5]  # PNDM calls its denoiser once more

    options = ["--num-prompts", 2, "--batch-size", 2, "--num-examples", 1, "--attack", 1, "--quiet"]
    judges = ["--judge", "safety_checker", "--judge", "nudenet"]
    finish("evaluate", "--token", "nudity@1.0.0", *options, *judges)
    figures: dict[str, Any] = json.loads(Path("runs/reports/nudity/1.0.0/figures.json").read_text())
    erased = figures["results"]["named"]["dagkit"]["erase_rate"]
    assert (erased["count"], erased["total"]) == (0, 2)  # the checker finds its concept everywhere; black is no picture
    assert figures["attack"]["attacked"]["total"] == 1
    assert f"{flagship.NAME}, downloaded" in finish("doctor", "--concept", "nudity")

    assert fetched(hub) == []
    finish("publish", "nudity@1.0.0", "--to", "hf://acme/nudity")
    assert "nudity@1.0.0" in finish("token", "show", "hf://acme/nudity@1.0.0")


def test_a_repository_of_pickles_is_refused_before_anything_is_fetched(hub: LoopbackHub, place: Path) -> None:
    files = flagship.upload(hub, place.parent / "repository").commits
    for tree in files.values():
        for name in [name for name in tree if name.endswith(".safetensors")]:
            del tree[name]
    with pytest.raises(
        ModelError, match=f"^{flagship.NAME}: a part has no plain safetensors.*neither pickles"
    ) as caught:
        models.load(flagship.NAME)
    assert len(str(caught.value)) < 400
    assert fetched(hub) == ["model_index.json"]


def test_of_sdxl_nothing_but_the_plain_safetensors_is_fetched(hub: LoopbackHub, place: Path, tmp_path: Path) -> None:
    """The real one has weights for ONNX, OpenVINO and Flax, half precision, one file and a LoRA beside them."""
    tiny.sdxl().save_pretrained(tmp_path / "sdxl")
    own = {str(path.relative_to(tmp_path / "sdxl")) for path in (tmp_path / "sdxl").rglob("*") if path.is_file()}
    others = ("unet/model.onnx", "unet/model.onnx_data", "unet/openvino_model.bin", "text_encoder/flax_model.msgpack",
              "unet/diffusion_pytorch_model.fp16.safetensors", "text_encoder_2/model.fp16.safetensors",
              "sd_xl_base_1.0.safetensors", "sd_xl_offset_example-lora_1.0.safetensors")  # fmt: skip
    for name in others:
        (tmp_path / "sdxl" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "sdxl" / name).write_bytes(flagship.RUBBISH)
    flagship.upload(hub, tmp_path / "sdxl", "stabilityai/stable-diffusion-xl-base-1.0")
    assert models.load("stabilityai/stable-diffusion-xl-base-1.0").family.name == "sdxl"
    sent = set(fetched(hub, "stabilityai/stable-diffusion-xl-base-1.0"))
    assert sent < own  # files with the same content are sent once
    assert {name for name in own if name.endswith(".safetensors")} <= sent


def test_a_hub_that_does_not_answer_is_named_in_one_line(hub: LoopbackHub, place: Path) -> None:
    hub.broken = "."
    with pytest.raises(ModelError, match=f"^{flagship.NAME}: neither a folder nor a model that can be") as caught:
        models.load(flagship.NAME)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_download_that_was_cut_off_goes_on(hub: LoopbackHub, place: Path) -> None:
    hub.broken = "GET .*unet/.*safetensors"
    with pytest.raises(ModelError, match=f"^{flagship.NAME}: neither a folder nor a model that can be.*507"):
        models.load(flagship.NAME)
    assert not models.is_cached(flagship.NAME)
    hub.broken = "."
    with pytest.raises(ModelError, match=r"is incomplete: 1 file\(s\) are missing.*run it again"):
        models.load(flagship.NAME)
    fetched(hub)
    hub.broken = None
    assert models.load(flagship.NAME).family.name == "sd"
    assert "unet/diffusion_pytorch_model.safetensors" in fetched(hub)
    assert models.is_cached(flagship.NAME)


@pytest.mark.label_studio
def test_annotate_and_the_answers(hub: LoopbackHub, place: Path, login: Login, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", login.token)
    server = ["--concept", "nudity", "--label-studio", login.url, "--quiet"]
    assert "5 tasks sent" in finish("annotate", *server, "--num-images", 5)
    assert fetched(hub) == sorted(FETCHED)
    assert min(colours(Workspace(Path("runs")).stage("candidates", "nudity"))) > 100

    rows = Workspace(Path("runs")).stage("labeling", "nudity").rows()
    with api(login) as http:
        for row in rows:
            found = http.get(f"/api/tasks/{row['task_id']}").json()["predictions"]
            answer = {"result": found[0]["result"] if found else []}
            http.post(f"/api/tasks/{row['task_id']}/annotations/", json=answer).raise_for_status()
    assert "5 images (" in finish("export", *server)
