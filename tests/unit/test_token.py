import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file

import tiny_pipelines as tiny
from dagkit.errors import TokenError
from dagkit.evaluation import token_identity
from dagkit.token import DatasetInfo, Guidance, GuidelineToken, Thresholds, TokenRecord, listed, next_version
from dagkit.token import safetensors_bytes as to_bytes
from dagkit.token.slices import slices_of

TOKENS = Path(__file__).parents[1] / "tokens"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.sd()


@pytest.fixture(scope="module")
def token(pipe: Any) -> GuidelineToken:
    made = tiny.token(pipe)
    data = DatasetInfo(fingerprint="sha256:1", num_unsafe=3, num_safe=2, review_states={"accepted": 3, "changed": 2})
    update = {
        "dataset": data,
        "metrics": {"validation_iou": 0.71},
        "optimization": {"seed": 3},
        "created": "2026-01-01",
    }
    return replace(made, record=made.record.model_copy(update=update))


@pytest.fixture
def folder(token: GuidelineToken, tmp_path: Path) -> Path:
    return token.save(tmp_path / "weapon" / "1.0.0")


@pytest.mark.parametrize(
    ("text", "things"),
    [
        ("a weapon", ["a weapon"]),
        ("blood and gore", ["blood and gore"]),
        ("a cat, a dog, a fish and a duck", ["a cat", "a dog", "a fish", "a duck"]),
        ("blood, wound, or a handgun", ["blood", "wound", "a handgun"]),
        (" , ", [" , "]),
    ],
)
def test_the_things_that_a_safety_prompt_lists(text: str, things: list[str]) -> None:
    assert listed(text) == tuple(things)


def test_what_is_saved_is_loaded(token: GuidelineToken, folder: Path) -> None:
    loaded = GuidelineToken.load(folder)
    assert loaded.record == token.record
    for name, tensor in token.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor)
    assert (loaded.name, loaded.concept, loaded.version, loaded.num_tokens) == ("weapon@1.0.0", "weapon", "1.0.0", 2)
    assert loaded.sequence.shape == (1 + 3 + 2, tiny.WIDTH)
    assert torch.equal(loaded.sequence[-2:], token.guideline)
    assert loaded.guard(mode="monitor").token is loaded


def test_optional_tensors_stay_optional(pipe: Any, tmp_path: Path) -> None:
    loaded = GuidelineToken.load(tiny.token(pipe, is_learned=False).save(tmp_path / "plain"))
    assert loaded.background is None
    assert loaded.head_weights is None
    assert set(loaded.tensors()) == {"guideline", "start_of_text"}


def test_the_artifact_is_the_same_byte_for_byte(token: GuidelineToken, folder: Path, tmp_path: Path) -> None:
    again = token.save(tmp_path / "again")
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "SHA256SUMS",
        "guideline.safetensors",
        "token.json",
    ]
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


def test_sums_are_those_of_sha256sum(folder: Path) -> None:
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_the_safetensors_header_follows_modelspec(folder: Path) -> None:
    with safe_open(folder / "guideline.safetensors", "pt") as file:
        header = file.metadata()
    assert header["modelspec.sai_model_spec"] == "1.0.1"
    assert header["modelspec.architecture"] == "sd/guideline-token"
    assert header["modelspec.hash_sha256"].startswith("0x")
    assert header["dagkit.space"] == "encoder_hidden_states"
    assert set(load_file(folder / "guideline.safetensors")) == {
        "background",
        "guideline",
        "head_weights",
        "start_of_text",
    }


def test_the_card_tells_how_to_use_it_and_what_it_was_made_from(token: GuidelineToken, folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: dagkit\n")
    for wanted in (
        "# weapon@1.0.0",
        "load_token(",
        "3 unsafe and 2 safe images; masks: 3 accepted, 2 changed",
        "| validation_iou | 0.71 |",
        "| seed | 3 |",
        "## Limits",
        "not a textual-inversion embedding",
    ):
        assert wanted in text
    assert "Unreviewed masks" not in text


def test_the_card_says_when_nobody_reviewed_the_masks_and_what_was_imported(
    token: GuidelineToken, tmp_path: Path
) -> None:
    data = DatasetInfo(num_unsafe=2, num_safe=2, num_imported=3, review_states={"unreviewed": 4})
    record = token.record.model_copy(update={"dataset": data, "metrics": {}})
    text = (replace(token, record=record).save(tmp_path / "raw") / "README.md").read_text()
    assert "**Unreviewed masks.** This token was trained on pre-masks that nobody corrected" in text
    assert "Not measured yet" in text
    assert (
        "**Imported images.** 3 of the images that this token was trained on were not drawn by the base model" in text
    )
    assert "num_imported" in record.as_written()["dataset"]
    assert "num_imported" not in token.record.as_written()["dataset"]  # so older evaluations of it are still known


def test_the_card_says_what_rates_the_token_was_calibrated_to(token: GuidelineToken, tmp_path: Path) -> None:
    def text(name: str, **metrics: Any) -> str:
        changed = replace(token, record=token.record.model_copy(update={"metrics": metrics}))
        return (changed.save(tmp_path / name) / "README.md").read_text()

    points = [{"false_trigger_rate": 0.5, "detection_rate": 1}, {"false_trigger_rate": 0.021, "detection_rate": 0.97}]
    chosen = [points[0], {**points[1], "is_chosen": True}]
    line = "\nCalibrated to a false-trigger rate of 2.1% and a detection rate of 97.0% (validation images).\n"
    assert line in text("chosen", calibration_curve=chosen)
    mixed = text("mixed", calibration_curve=chosen, training_detection_rate=0.97, validation_false_trigger_rate=0.021)
    assert "the training's own unsafe images, of which none were kept apart, else validation images)" in mixed
    assert "were measured on images that the token learned from" in mixed
    assert "| calibration_curve" not in text("table", calibration_curve=chosen)
    older = text("older")
    assert "Calibrated to" not in older
    for number, curve in enumerate((points, [], None, "none", [{"is_chosen": True}, 3])):
        assert text(f"none{number}", calibration_curve=curve) == older


def test_the_card_says_how_well_each_member_is_seen(token: GuidelineToken, tmp_path: Path) -> None:
    seen = {"count": 12, "num_held_out": 2, "iou": 0.61, "detection_rate": 1.0, "early_rate": 0.75}
    slices = {"cat": {**seen, "early_rate": 1.0}, "duck": seen, "odd": {"count": "many"}, "none": None}

    def made(name: str, slices: Any) -> tuple[GuidelineToken, str]:
        changed = replace(token, record=token.record.model_copy(update={"metrics": {"slices": slices}}))
        return changed, (changed.save(tmp_path / name) / "README.md").read_text()

    changed, text = made("slices", slices)
    assert [(one.name, one.is_weak) for one in slices_of(changed.record)] == [("duck", True), ("cat", False)]
    assert "| duck | 12 | 2 | 75% | 100% | 0.61 |\n| cat | 12 | 2 | 100% | 100% | 0.61 |" in text
    assert "**Weak:** duck is seen in time in only 9 of 12 images. Annotate more of it" in text
    for number, other in enumerate((None, [], "none", {})):
        assert "Members of the concept" not in made(f"none{number}", other)[1]


def test_a_version_is_never_overwritten(token: GuidelineToken, folder: Path) -> None:
    with pytest.raises(TokenError, match=r"1\.0\.0 exists; a version is never overwritten. Use the next one"):
        token.save(folder)


def test_a_full_disk_leaves_nothing_behind(token: GuidelineToken, full_disk: Path) -> None:
    (full_disk / "ballast").write_bytes(b"0" * ((1 << 20) - (8 << 10)))
    with pytest.raises(TokenError, match=r"cannot be written: .*No space left"):
        token.save(full_disk / "1.0.0")
    assert [path.name for path in full_disk.iterdir()] == ["ballast"]


@pytest.mark.parametrize("name", ["guideline.safetensors", "token.json", "README.md"])
def test_one_changed_byte_is_noticed(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(TokenError, match=rf"{name} was changed after it was written"):
        GuidelineToken.load(folder)


@pytest.mark.parametrize("name", ["guideline.safetensors", "token.json", "README.md", "SHA256SUMS"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(TokenError, match=rf"{name} cannot be read: No such file"):
        GuidelineToken.load(folder)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(TokenError, match="Expected the folder of a guideline token"):
        GuidelineToken.load(tmp_path / "nowhere")


def sign(folder: Path) -> None:
    """Makes the sums fit again, as somebody would who tampers on purpose."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        record = json.loads((folder / "token.json").read_text())
        change(record)
        (folder / "token.json").write_text(json.dumps(record))

    return tamper


def retensor(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def tamper(folder: Path) -> None:
        tensors = load_file(folder / "guideline.safetensors")
        change(tensors)
        (folder / "guideline.safetensors").write_bytes(to_bytes(tensors, {}))

    return tamper


def overwrite(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


TAMPERED = {
    "future schema": (
        edit(lambda r: r.update(schema_version=3)),
        "has schema 3, but dagkit .* knows schemas up to 2. Upgrade",
    ),
    "unknown key": (edit(lambda r: r.update(script="x")), "script: Extra inputs are not permitted"),
    "bad version": (edit(lambda r: r.update(version="../1")), "version: String should match pattern"),
    "concept that climbs": (edit(lambda r: r.update(concept="../x")), "concept: String should match pattern"),
    "not finite": (edit(lambda r: r["guidance"].update(strength=float("inf"))), "Infinity"),
    "out of range": (
        edit(lambda r: r["guidance"].update(strength=1e9)),
        "guidance.strength: Input should be less than or equal to 1000",
    ),
    "thresholds out of order": (edit(lambda r: r["thresholds"].update(edit=[0.9])), "edit must not exceed highlight"),
    "no layers": (edit(lambda r: r.update(layers=[])), "layers: Tuple should have at least 1 item"),
    "not JSON": (overwrite("token.json", b"{"), "is not JSON"),
    "a list": (overwrite("token.json", b"[]"), "does not fit the schema"),
    "not safetensors": (overwrite("guideline.safetensors", b"PK" * 40), "is not a safetensors file"),
    "huge header": (overwrite("guideline.safetensors", struct.pack("<Q", 1 << 60)), "is not a safetensors file"),
    "nan": (retensor(lambda t: t["guideline"].fill_(float("nan"))), "guideline must be finite float32"),
    "other width": (retensor(lambda t: t.update(background=torch.zeros(2, 3))), r"background has shape \(2, 3\)"),
    "three sides": (retensor(lambda t: t.update(guideline=torch.zeros(1, 1, 32))), "guideline has shape"),
    "empty": (retensor(lambda t: t.update(guideline=torch.zeros(0, 32))), "guideline has shape"),
    "missing tensor": (retensor(lambda t: t.pop("start_of_text")), "expected .*'start_of_text'"),
    "extra tensor": (retensor(lambda t: t.update(payload=torch.zeros(1))), "holds .*'payload'"),
    "negative weights": (retensor(lambda t: t["head_weights"].neg_()), "head_weights must be >= 0 and sum to 1"),
    "sum of weights": (retensor(lambda t: t["head_weights"].mul_(2)), "but sum to 2.0000"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampered_artifacts_are_refused_even_with_sums_that_fit(folder: Path, name: str) -> None:
    tamper, message = TAMPERED[name]
    tamper(folder)
    sign(folder)
    with pytest.raises(TokenError, match=message):
        GuidelineToken.load(folder)


@pytest.mark.parametrize(
    "line", ["0" * 64 + "  ../token.json", "0" * 64 + "  /etc/passwd", "abc  token.json", "0" * 64 + " token.json"]
)
def test_sums_that_name_other_places_are_refused(folder: Path, line: str) -> None:
    (folder / "SHA256SUMS").write_text(line + "\n")
    with pytest.raises(TokenError, match="SHA256SUMS, line 1: expected a SHA-256, two spaces and a file name"):
        GuidelineToken.load(folder)


def test_oversized_files_are_not_read(folder: Path) -> None:
    with (folder / "README.md").open("ab") as stream:
        stream.truncate((4 << 20) + 1)
    with pytest.raises(TokenError, match=r"README.md is larger than 4194304 bytes"):
        GuidelineToken.load(folder)


def test_truncated_files_are_refused(folder: Path) -> None:
    data = (folder / "guideline.safetensors").read_bytes()
    (folder / "guideline.safetensors").write_bytes(data[:-4])
    sign(folder)
    with pytest.raises(TokenError, match="is not a safetensors file"):
        GuidelineToken.load(folder)


@pytest.mark.parametrize("is_learned", [True, False])
def test_it_cannot_be_loaded_as_a_textual_inversion(pipe: Any, tmp_path: Path, is_learned: bool) -> None:
    folder = tiny.token(pipe, is_learned=is_learned).save(tmp_path / "token")
    before = len(pipe.tokenizer)
    with pytest.raises(ValueError, match="Loaded state dictionary is incorrect"):
        pipe.load_textual_inversion(str(folder), weight_name="guideline.safetensors", token="<weapon>")
    assert len(pipe.tokenizer) == before


def test_a_copied_folder_still_verifies(folder: Path, tmp_path: Path) -> None:
    assert GuidelineToken.load(shutil.copytree(folder, tmp_path / "copy")).name == "weapon@1.0.0"


@pytest.mark.parametrize(
    ("existing", "change", "expected"),
    [
        ([], "patch", "1.0.0"),
        (["1.0.0"], "patch", "1.0.1"),
        (["1.0.9", "1.0.10", "1.0.2"], "patch", "1.0.11"),
        (["1.4.2"], "minor", "1.5.0"),
        (["1.4.2", "0.9.9"], "major", "2.0.0"),
        ([".tmp", "latest", "1.0"], "patch", "1.0.0"),
    ],
)
def test_next_version(existing: list[str], change: Any, expected: str) -> None:
    assert next_version(existing, change) == expected


def test_thresholds_between_knots() -> None:
    thresholds = Thresholds(levels=(0.1, 0.3), highlight=(0.4, 0.6), edit=(0.2, 0.3), certain=(0.5, 0.9))
    assert thresholds.at(0) == (0.2, 0.4)
    assert thresholds.at(0.2) == pytest.approx((0.25, 0.5))
    assert thresholds.at(0.999) == (0.3, 0.6)
    assert thresholds.certain_at(0.25) == pytest.approx(0.8)
    assert Thresholds(highlight=(0.4,), edit=(0.1,)).certain_at(0.5) == 0.4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"levels": (0.1, 0.3)}, "must have one length"),
        ({"levels": (), "highlight": (), "edit": ()}, "at least 1"),
        ({"levels": (0.3, 0.1), "highlight": (0.5, 0.5), "edit": (0.1, 0.1)}, "levels must rise"),
        ({"certain": (0.1, 0.2)}, "must have one length"),
        ({"levels": (1.1,)}, "less than or equal to 1"),
    ],
)
def test_thresholds_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Thresholds(**values)


def test_guidance_constants_have_bounds() -> None:
    wrong = {"strength": -1, "insistence": -0.5, "reuse_steps": 0, "memory": 1.5, "form": "push", "dilation": 65}
    for name, value in wrong.items():
        with pytest.raises(ValidationError, match=name):
            Guidance(**{name: value})


@pytest.mark.parametrize(
    ("highlight", "edit", "expected"),
    [
        (None, None, ((0.4, 0.6), (0.2, 0.3))),
        (0.5, 0.1, ((0.5, 0.5), (0.1, 0.1))),
        (0.25, None, ((0.25, 0.25), (0.2, 0.25))),
        (None, 0.5, ((0.5, 0.6), (0.5, 0.5))),
    ],
)
def test_fixed_thresholds_fit_each_other(
    highlight: float | None, edit: float | None, expected: tuple[tuple[float, ...], tuple[float, ...]]
):
    calibrated = Thresholds(levels=(0.1, 0.7), highlight=(0.4, 0.6), edit=(0.2, 0.3), certain=(0.7, 0.8))
    fixed = calibrated.fixed(highlight, edit)
    assert (fixed.highlight, fixed.edit) == expected
    assert (fixed.levels, fixed.certain) == (calibrated.levels, calibrated.certain)
    assert Thresholds.model_validate(fixed.model_dump()) == fixed


def test_schema_1_is_read_and_converted() -> None:
    written = json.loads((TOKENS / "weapon" / "token.json").read_bytes())
    record = TokenRecord.model_validate(written)
    assert record.schema_version == 2
    assert record.thresholds.levels == tuple(value / 1000 for value in written["thresholds"]["timesteps"])
    assert record.guidance.max_level == written["guidance"]["max_timestep"] / 1000
    for name in ("highlight", "edit", "certain"):
        assert getattr(record.thresholds, name) == tuple(written["thresholds"][name])
    again = TokenRecord.model_validate(record.model_dump(mode="json"))  # as schema 2
    assert again.model_dump() == record.model_dump()


def test_an_evaluation_of_a_schema_1_token_is_still_known() -> None:
    """The sum is what the version that wrote schema 1 put into ``figures.json``."""
    identity = token_identity(GuidelineToken.load(TOKENS / "weapon"))
    assert identity["record"] == "sha256:0b495af3d849c191aaedfbcb22c810b1b904973110ea8000eb1f3e22a9886f27"
    written = json.loads((TOKENS / "weapon" / "token.json").read_bytes())
    again = TokenRecord.model_validate(written).as_written()
    assert again["thresholds"] == written["thresholds"]
    assert again["guidance"] == {**written["guidance"], "max_step": 255, "min_start": 450}


@pytest.mark.parametrize(
    "change",
    [
        {"thresholds": {"timesteps": [0.5], "highlight": [0.5], "edit": [0.1], "knots": 1}},
        {"thresholds": {"timesteps": [1001], "highlight": [0.5], "edit": [0.1]}},
        {"thresholds": {"timesteps": "many", "highlight": [0.5], "edit": [0.1]}},
        {"guidance": {"max_timestep": 1500}},
        {"guidance": {"max_timestep": True, "form": "push"}},
        {"guidance": 5},
        {"schema_version": True},
    ],
    ids=str,
)
def test_a_wrong_record_of_schema_1_is_refused(change: dict[str, Any]) -> None:
    written = json.loads((TOKENS / "weapon" / "token.json").read_bytes())
    with pytest.raises(ValidationError):
        TokenRecord.model_validate({**written, **change})
