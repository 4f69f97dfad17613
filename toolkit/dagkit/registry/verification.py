"""Everything about a token that can be checked without its base model, check by check."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from dagkit.errors import TokenError
from dagkit.models import sketch
from dagkit.registry.index import SIGNATURE_FILE
from dagkit.registry.resolution import ResolvedToken, load_resolved
from dagkit.registry.signing import MAX_SIGNATURE_BYTES, verify_signature
from dagkit.token import TENSORS_FILE, GuidelineToken, artifact_files, read_file


@dataclass(frozen=True)
class Check:
    """One check: its name, whether it passed, and the finding in words."""

    name: str
    is_passed: bool
    text: str


def verify(resolved: ResolvedToken, *, public_key: Path | None = None) -> tuple[GuidelineToken | None, list[Check]]:
    """Checks an artifact: files, sums, schema, tensors, header, fingerprints and signature.

    Args:
        resolved: the token.
        public_key: the token must be signed with this key.

    Returns:
        The token, or None where it cannot be loaded, and the checks that were made.
    """
    folder = resolved.path
    try:
        token = load_resolved(resolved)
    except TokenError as error:
        return None, [Check("artifact", False, str(error))]
    rows = " x ".join(map(str, token.guideline.shape))
    checks = [
        Check("sums", True, "all files are as they were written"),
        Check("schema", True, f"token.json fits schema {token.record.schema_version}"),
        Check("tensors", True, f"finite float32, guideline {rows}"),
        _header(folder, token),
        *_fingerprints(token),
    ]
    signature = _signature(folder, public_key)
    return token, [*checks, *([signature] if signature else [])]


def _header(folder: Path, token: GuidelineToken) -> Check:
    data = read_file(folder / TENSORS_FILE, 1 << 30)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    values = b"".join(tensor.contiguous().numpy().tobytes() for _, tensor in sorted(token.tensors().items()))
    expected = {
        "dagkit.concept": token.concept,
        "dagkit.version": token.version,
        "modelspec.hash_sha256": f"0x{hashlib.sha256(values).hexdigest()}",
    }
    wrong = [name for name, value in expected.items() if header.get(name) != value]
    if wrong:
        return Check("header", False, f"{', '.join(wrong)} of {TENSORS_FILE} do not fit token.json and tensors")
    return Check("header", True, "the tensor file's header fits token.json and its tensors")


def _fingerprints(token: GuidelineToken) -> list[Check]:
    model, wrong = token.record.base_model, []
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", model.fingerprint):
        wrong.append("fingerprint is not a SHA-256")
    for part in ("text_encoder", "key_projections"):
        try:
            sketch.difference(getattr(model, part), getattr(model, part))
        except ValueError as error:
            wrong.append(f"{part}: {error}")
    if wrong:
        return [Check("fingerprints", False, "; ".join(wrong))]
    return [Check("fingerprints", True, f"of {model.id} ({model.architecture}), well-formed")]


def _signature(folder: Path, public_key: Path | None) -> Check | None:
    path = folder / SIGNATURE_FILE
    is_signed = path.is_file()
    if public_key is None:
        hint = "; give --public-key to check it" if is_signed else ""
        return Check("signature", True, f"{'signed' if is_signed else 'not signed'}{hint}")
    if not is_signed:
        return Check("signature", False, f"not signed, but --public-key {public_key.name} was given")
    try:
        verify_signature(artifact_files(folder), read_file(path, MAX_SIGNATURE_BYTES), public_key, str(folder))
    except TokenError as error:
        return Check("signature", False, str(error))
    return Check("signature", True, f"signed with {public_key.name}")
