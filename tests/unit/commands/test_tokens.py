"""token list | show | verify | diff | sign, on folders, names and URLs; and registry."""

import json
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner, Result

from dagkit import registry
from dagkit.cli import command
from dagkit.errors import TokenError
from dagkit.token import BaseModelInfo, GuidelineToken
from small_tokens import save_small_token, seal, small_token
from tiny_pipelines import sd


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two versions of one concept and one of another, the first one published too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DAGKIT_WORKSPACE", str(tmp_path / "runs"))
    root = tmp_path / "runs" / "tokens"
    folder = save_small_token(root, "1.0.0")
    small_token("1.1.0", seed=1, metrics={"validation_iou": 0.75}).save(root / "weapon" / "1.1.0")
    save_small_token(root, "2.0.0", concept="violence")
    registry.publish(registry.pack(folder), registry.open_location(f"file://{tmp_path}/published"))
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, ["token", *map(str, arguments)], catch_exceptions=False)


def test_list(workspace: Path):
    lines = run("list").output.splitlines()
    assert [line.split()[0] for line in lines] == ["violence@2.0.0", "weapon@1.0.0", "weapon@1.1.0"]
    assert lines[1].split()[1] == "acme/small-sd"
    assert [row["token"] for row in json.loads(run("list", "weapon", "--json").output)] == [
        "weapon@1.0.0",
        "weapon@1.1.0",
    ]
    url = f"file://{workspace}/published"
    assert run("list", url).output.split() == ["weapon@1.0.0", "acme/small-sd", f"{url}@1.0.0"]
    assert "no tokens of nudity found. Train one with: dagkit optimize" in run("list", "nudity").output
    assert "no tokens" in run("list", f"file://{workspace}/nowhere").output


def test_list_shows_damaged_tokens_as_such(workspace: Path):
    (workspace / "runs" / "tokens" / "weapon" / "1.0.0" / "README.md").write_text("changed")
    assert ["weapon@1.0.0", "DAMAGED"] in [line.split()[:2] for line in run("list").output.splitlines()]


@pytest.mark.parametrize("where", ["weapon@1.0.0", "runs/tokens/weapon/1.0.0", "file://{}/published@^1"])
def test_every_command_takes_every_reference(workspace: Path, where: str):
    reference = where.format(workspace)

    assert "token:         weapon@1.0.0" in run("show", reference).output
    assert json.loads(run("show", reference, "--json").output)["record"]["version"] == "1.0.0"
    assert run("verify", reference).exit_code == 0
    same = run("diff", reference, "weapon@1.0.0")
    assert (same.exit_code, same.output.strip()) == (0, "weapon@1.0.0 and weapon@1.0.0 are the same")


def test_show_says_what_it_was_made_from(workspace: Path):
    shown = run("show", "weapon").output
    for part in (
        "acme/small-sd (sd)",
        "30 unsafe and 20 safe images; masks: 50 accepted",
        "validation_iou 0.75",
        "guideline 2 x 8",
    ):
        assert part in shown


def test_show_says_what_rates_it_was_calibrated_to(workspace: Path):
    curve = [{"false_trigger_rate": 0.021, "detection_rate": 0.97, "is_chosen": True}]
    small_token("1.2.0", metrics={"calibration_curve": curve}).save("runs/tokens/weapon/1.2.0")
    rates = "a false-trigger rate of 2.1% and a detection rate of 97.0% (validation images)"
    assert f"calibrated to: {rates}\n" in run("show", "weapon@1.2.0").output
    assert "calibrated to: not recorded\n" in run("show", "weapon@1.1.0").output


def test_show_says_how_well_each_member_is_seen(workspace: Path):
    duck = {"count": 12, "num_held_out": 2, "iou": 0.61, "detection_rate": 1.0, "early_rate": 0.75}
    small_token("1.3.0", metrics={"slices": {"duck": duck}}).save("runs/tokens/weapon/1.3.0")
    assert "members:       duck: 9 of 12 seen in time (2 held out), IoU 0.61\n" in run("show", "weapon@1.3.0").output


def test_diff_names_settings_and_tensors(workspace: Path):
    changed = run("diff", "weapon@1.0.0", "weapon@1.1.0")
    names = [line.split(":")[0] for line in changed.output.splitlines()]

    assert changed.exit_code == 1
    assert names == [
        "metrics.validation_iou",
        "tensors.background",
        "tensors.guideline",
        "tensors.start_of_text",
        "version",
    ]
    assert json.loads(run("diff", "weapon@1.0.0", "weapon", "--json").output)["version"] == ["1.0.0", "1.1.0"]


def verdicts(result: Result) -> dict[str, bool]:
    return {check["name"]: check["is_passed"] for check in json.loads(result.output)["checks"]}


def test_verify_reports_every_check(workspace: Path):
    result = run("verify", "weapon", "--json")
    assert result.exit_code == 0
    assert verdicts(result) == dict.fromkeys(["sums", "schema", "tensors", "header", "fingerprints", "signature"], True)
    assert "signature: not signed" in run("verify", "weapon").output


def test_verify_finds_damage(workspace: Path):
    (workspace / "runs" / "tokens" / "weapon" / "1.1.0" / "token.json").write_text("{}")
    result = run("verify", "weapon")
    assert result.exit_code == 1
    assert "WRONG artifact:" in result.output
    assert "token.json was changed after it was written" in result.output


def test_verify_finds_what_new_sums_hide(workspace: Path):
    folder = workspace / "runs" / "tokens" / "weapon" / "1.1.0"
    record = json.loads((folder / "token.json").read_text())
    record["base_model"]["fingerprint"] = "sha256:short"
    (folder / "token.json").write_text(json.dumps(record))
    other = workspace / "runs" / "tokens" / "violence" / "2.0.0" / "guideline.safetensors"
    (folder / "guideline.safetensors").write_bytes(other.read_bytes())
    seal(folder)

    result = run("verify", "weapon", "--json")
    assert result.exit_code == 1
    assert [name for name, passed in verdicts(result).items() if not passed] == ["header", "fingerprints"]
    assert "dagkit.concept, dagkit.version of guideline.safetensors" in result.output
    assert "fingerprint is not a SHA-256" in result.output


def test_verify_against_a_base_model(workspace: Path):
    pipe = sd()
    pipe.save_pretrained("model")
    from dagkit import models

    model = models.load(workspace / "model")
    layers = model.family.sites(model.pipe)
    info = BaseModelInfo(
        id="model", architecture="sd", fingerprint=model.fingerprint, **model.family.fingerprints(model.pipe, layers)
    )
    rows = small_token().guideline.repeat(1, 4)
    record = small_token("3.0.0", base_model=info, layers=tuple(layers)).record
    GuidelineToken(rows, rows[:1], None, None, record).save("runs/tokens/weapon/3.0.0")

    fitting = run("verify", "weapon", "--model", workspace / "model", "--json")
    assert verdicts(fitting)["base model"]
    other = run("verify", "weapon@1.0.0", "--model", workspace / "model", "--json")
    assert other.exit_code == 1
    assert not verdicts(other)["base model"]


def test_sign_then_publish_then_verify(workspace: Path, monkeypatch: pytest.MonkeyPatch):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    pem = serialization.Encoding.PEM
    password = serialization.BestAvailableEncryption(b"sesame")
    Path("key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, password))
    Path("key.pub").write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))

    asked = CliRunner().invoke(command, ["token", "sign", "weapon@1.1.0", "--private-key", "key.pem"], input="sesame\n")
    assert asked.exit_code == 0, asked.output
    assert "sesame" not in asked.output
    registry.publish(
        registry.pack(Path("runs/tokens/weapon/1.1.0")), registry.open_location(f"file://{workspace}/published")
    )
    url = f"file://{workspace}/published@1.1.0"
    assert verdicts(run("verify", url, "--public-key", "key.pub", "--json"))["signature"]
    unsigned = run("verify", f"file://{workspace}/published@1.0.0", "--public-key", "key.pub")
    assert unsigned.exit_code == 1
    assert "signature: not signed, but --public-key key.pub was given" in unsigned.output
    with pytest.raises(TokenError, match=r"a published version never changes. Sign the token first"):
        run("sign", f"file://{workspace}/published@1.0.0", "--private-key", "key.pem")
    monkeypatch.setenv("DAGKIT_KEY_PASSWORD", "sesame")
    assert run("sign", "weapon@1.0.0", "--private-key", "key.pem").exit_code == 0


def test_registry_lists_and_verifies(workspace: Path):
    url = f"file://{workspace}/published"
    good = CliRunner().invoke(command, ["registry", url], catch_exceptions=False)
    assert (good.exit_code, good.output.split()[0], good.output.split()[-1]) == (0, "weapon@1.0.0", "ok")

    (workspace / "published" / "INDEX.md").unlink()
    CliRunner().invoke(command, ["registry", url, "--write-page"], catch_exceptions=False)
    assert "| 1.0.0 |" in (workspace / "published" / "INDEX.md").read_text()

    next(workspace.glob("published/*/README.md")).write_text("changed")
    bad = CliRunner().invoke(command, ["registry", url, "--json"], catch_exceptions=False)
    assert bad.exit_code == 1
    assert "README.md was changed after it was published" in json.loads(bad.output)["versions"][0]["problem"]


def test_schema_is_the_published_one(workspace: Path):
    """If this fails: dagkit token schema > docs/token.schema.json."""
    published = Path(__file__).parents[3] / "docs" / "token.schema.json"
    assert run("schema").output == published.read_text()

    schema = json.loads(published.read_text())
    record = json.loads((workspace / "runs/tokens/weapon/1.0.0/token.json").read_text())
    jsonschema.validate(record, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(record | {"concept": "../x"}, schema)
