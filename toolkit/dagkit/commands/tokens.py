"""token: list, show, verify, compare and sign guideline tokens, wherever they are."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dagkit.commands import _common as common

if TYPE_CHECKING:
    from dagkit.registry import Check, ResolvedToken
    from dagkit.token import GuidelineToken

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group("token")
def command() -> None:
    """List, show, verify, compare and sign guideline tokens.

    A token is named by its folder, by name@version (weapon@1.2.0, weapon@^1.2, weapon, the newest), or by a URL
    (hf://org/name@1.0.0, s3://bucket/prefix@^1, file:///folder@latest).
    """


@command.command("list")
@click.argument("where", required=False, metavar="[CONCEPT|URL]")
@common.workspace_option
@_json
def list_command(where: str | None, workspace_path: Path, as_json: bool) -> None:
    """List the tokens that can be used by name, or those published at a URL."""
    from dagkit import registry
    from dagkit.registry.index import plain

    rows: list[dict[str, Any]] = []
    if where and "://" in where:
        location = registry.open_location(where)
        if (index := location.read_index()) is not None:
            rows = [
                {
                    "token": f"{index.concept}@{entry.version}",
                    "base_model": plain(entry.base_model),
                    "where": f"{location.url}@{entry.version}",
                }
                for entry in index.versions
            ]
    else:
        for root in registry.token_roots(workspace_path):
            for concept in registry.concepts_in(root):
                if where in (None, concept):
                    rows += [_row(root / concept / version) for version in registry.versions_in(root, concept)]
    if as_json:
        click.echo(json.dumps(rows))
        return
    widths = [max((len(row[key]) for row in rows), default=0) for key in ("token", "base_model")]
    for row in rows:
        click.echo(f"{row['token']:<{widths[0]}}  {row['base_model']:<{widths[1]}}  {row['where']}")
    if not rows:
        click.echo(f"no tokens {f'of {where} ' if where else ''}found. Train one with: dagkit optimize --concept NAME")


@command.command("show")
@click.argument("reference", metavar="TOKEN")
@common.workspace_option
@_json
def show_command(reference: str, workspace_path: Path, as_json: bool) -> None:
    """Show what a token is, what it was made from, and how."""
    from dagkit.token.card import calibration, tuning
    from dagkit.token.slices import slices_of

    resolved, token = _load(reference, workspace_path)
    record = token.record
    if as_json:
        shape = {name: list(tensor.shape) for name, tensor in token.tensors().items()}
        click.echo(json.dumps({"path": str(resolved.path), "tensors": shape, "record": record.model_dump(mode="json")}))
        return
    data = record.dataset
    states = ", ".join(f"{count} {state}" for state, count in sorted(data.review_states.items())) or "not recorded"
    imported = f", {data.num_imported} of them imported" if data.num_imported else ""
    shapes = ", ".join(f"{name} {' x '.join(map(str, t.shape))}" for name, t in token.tensors().items())
    figures = ", ".join(f"{key} {value:.4g}" for key, value in record.metrics.items() if isinstance(value, float))
    model, guidance = record.base_model, record.guidance
    lines = {
        "token": token.name,
        "path": resolved.path,
        "base model": f"{model.id} ({model.architecture}), {model.fingerprint[:23]}",
        "safety prompt": ", ".join(map(repr, record.pushed_away_from)),
        "guidance": tuning(record) or f"{guidance.form}, strength {guidance.strength:g}, not tuned",
        "layers": len(record.layers),
        "tensors": shapes,
        "trained on": f"{data.num_unsafe} unsafe and {data.num_safe} safe images{imported}; masks: {states}",
        "calibrated to": calibration(record) or "not recorded",
        "members": "; ".join(one.words() for one in slices_of(record)) or "not recorded",
        "figures": figures or "none",
        "made with": ", ".join(f"{name} {version}" for name, version in record.software.items()) or "not recorded",
        "created": record.created or "not recorded",
    }
    for name, value in lines.items():
        click.echo(f"{name + ':':<15}{value}")


@command.command("verify")
@click.argument("reference", metavar="TOKEN")
@click.option(
    "--public-key",
    type=click.Path(dir_okay=False, path_type=Path),
    help="PEM file: the token must be signed with this key.",
)
@click.option("--model", metavar="MODEL", help="Also compare fingerprints with this base model: as for sample.")
@common.model_config_option
@common.workspace_option
@_json
def verify_command(
    reference: str, public_key: Path | None, model: str | None, workspace_path: Path, as_json: bool
) -> None:
    """Check sums, schema, tensors, fingerprints and signature; exits with 1 if anything is wrong."""
    from dagkit import registry

    resolved = registry.resolve(reference, workspace=workspace_path)
    token, checks = registry.verify(resolved, public_key=public_key)
    if token is not None and model is not None:
        checks = [*checks, _model_check(token, model)]
    if as_json:
        rows = [{"name": check.name, "is_passed": check.is_passed, "text": check.text} for check in checks]
        click.echo(json.dumps({"path": str(resolved.path), "checks": rows}))
    else:
        for check in checks:
            mark = click.style("ok   ", fg="green") if check.is_passed else click.style("WRONG", fg="red")
            click.echo(f"{mark} {check.name}: {check.text}")
    if not all(check.is_passed for check in checks):
        sys.exit(1)


@command.command("diff")
@click.argument("old", metavar="TOKEN")
@click.argument("new", metavar="TOKEN")
@common.workspace_option
@_json
def diff_command(old: str, new: str, workspace_path: Path, as_json: bool) -> None:
    """Show what differs between two tokens, settings and tensors; exits with 1 if anything does."""
    (_, before), (_, after) = _load(old, workspace_path), _load(new, workspace_path)
    left, right = dict(_flat(before)), dict(_flat(after))
    changed = {
        key: (left.get(key), right.get(key)) for key in sorted({*left, *right}) if left.get(key) != right.get(key)
    }
    if as_json:
        click.echo(json.dumps({key: list(pair) for key, pair in changed.items()}))
    else:
        for key, (one, other) in changed.items():
            click.echo(f"{key}: {_short(one)} -> {_short(other)}")
        if not changed:
            click.echo(f"{before.name} and {after.name} are the same")
    if changed:
        sys.exit(1)


@command.command("sign")
@click.argument("reference", metavar="TOKEN")
@click.option(
    "--private-key",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="PEM file of a P-256, P-384 or P-521 key. A password is asked for, or taken from DAGKIT_KEY_PASSWORD.",
)
@common.workspace_option
def sign_command(reference: str, private_key: Path, workspace_path: Path) -> None:
    """Sign a token of this machine with your own key (extra 'sign'); publish sends the signature along."""
    from dagkit import registry
    from dagkit.errors import TokenError

    resolved = registry.resolve(reference, workspace=workspace_path)
    if resolved.url is not None:
        raise TokenError(f"{reference}: a published version never changes. Sign the token first, then publish it.")
    password = os.environ.get("DAGKIT_KEY_PASSWORD")
    if password is None and private_key.is_file() and b"ENCRYPTED" in private_key.read_bytes():
        password = click.prompt("Password of the key", hide_input=True, err=True)
    click.echo(f"token: signed, {registry.sign(resolved.path, private_key, password)}")


@command.command("schema")
def schema_command() -> None:
    """Print the JSON schema of token.json."""
    from dagkit.token import TokenRecord

    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **TokenRecord.model_json_schema()}
    click.echo(json.dumps(schema, indent=2, sort_keys=True))


def _load(reference: str, workspace: Path) -> tuple[ResolvedToken, GuidelineToken]:
    from dagkit import registry

    resolved = registry.resolve(reference, workspace=workspace)
    return resolved, registry.load_resolved(resolved)


def _row(folder: Path) -> dict[str, Any]:
    from dagkit.errors import TokenError
    from dagkit.token import GuidelineToken

    name = f"{folder.parent.name}@{folder.name}"
    try:
        model = GuidelineToken.load(folder).record.base_model.id
    except TokenError:
        model = "DAMAGED"
    return {"token": name, "base_model": model, "where": str(folder)}


def _model_check(token: GuidelineToken, model: str) -> Check:
    from dagkit import demo
    from dagkit.errors import GuardError
    from dagkit.registry import Check

    base = demo.load_model(model, config=common.model_config())
    try:
        token.guard().prepare(base.family, base.pipe)
    except GuardError as error:
        return Check("base model", False, str(error))
    return Check("base model", True, f"made for {model}")


def _flat(token: GuidelineToken) -> Iterator[tuple[str, Any]]:
    yield from _leaves("", token.record.model_dump(mode="json"))
    for name, tensor in token.tensors().items():
        values = tensor.double()
        digest = f"norm {float(values.norm()):.6g}, sum {float(values.sum()):.6g}"
        yield f"tensors.{name}", f"{' x '.join(map(str, tensor.shape))}, {digest}"


def _leaves(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix, value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
