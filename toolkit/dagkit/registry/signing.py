"""Signatures by `model-signing` (OpenSSF) with keys of one's own. Needs the extra ``sign``.

``model.sig`` is a Sigstore bundle over the artifact's four files, made with an elliptic-curve key (P-256, P-384 or
P-521). It can also be checked without dagkit::

    model_signing verify key FOLDER --signature FOLDER/model.sig --public_key KEY --ignore_unsigned_files
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dagkit.errors import TokenError
from dagkit.registry.index import SIGNATURE_FILE
from dagkit.token import GuidelineToken, artifact_files, read_file
from dagkit.workspace import atomic_write

MAX_SIGNATURE_BYTES = 1 << 20


def sign(folder: Path, private_key: Path, password: str | None = None) -> Path:
    """Signs a token and writes ``model.sig`` beside its files.

    Args:
        folder: of the token; it is verified first.
        private_key: PEM file of an elliptic-curve key.
        password: of the key.

    Raises:
        TokenError: the token is damaged or signed already, the key cannot be used, or the extra is not installed.
    """
    signing, _ = _model_signing()
    target = folder / SIGNATURE_FILE
    if target.exists():
        raise TokenError(f"{target} exists: the token is signed already. Delete it to sign anew.")
    if not private_key.is_file():
        raise TokenError(f"{private_key}: no such key. Make one with: openssl ecparam -name prime256v1 -genkey -noout")
    with _copy(artifact_files(folder), folder.name) as copy:
        GuidelineToken.load(copy)
        signature = copy.parent / SIGNATURE_FILE
        try:
            config = signing.Config().use_elliptic_key_signer(
                private_key=private_key, password=password.encode() if password else None
            )
            config.sign(copy, signature)
        except (ValueError, TypeError, AttributeError) as error:
            raise TokenError(
                f"{private_key} cannot sign: {_line(error)}. Expected the PEM file of a P-256, P-384 or P-521 key, "
                "and its password where it has one."
            ) from error
        atomic_write(target, signature.read_bytes())
    return target


def verify_signature(files: Mapping[str, bytes], signature: bytes, public_key: Path, where: str) -> None:
    """Checks that the owner of a key signed exactly these files.

    Args:
        files: the artifact's four files by name.
        signature: ``model.sig``.
        public_key: PEM file.
        where: for messages.

    Raises:
        TokenError: the signature does not fit the files or the key, or the extra is not installed.
    """
    _, verifying = _model_signing()
    if not public_key.is_file():
        raise TokenError(f"{public_key}: no such key. Give the signer's public key, a PEM file.")
    with _copy(files, "token") as copy:
        path = copy.parent / SIGNATURE_FILE
        path.write_bytes(signature)
        try:
            config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        except (ValueError, TypeError, AttributeError) as error:
            raise TokenError(
                f"{public_key} is not the public key of a P-256, P-384 or P-521 pair: {_line(error)}. "
                "Give its PEM file."
            ) from error
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                config.verify(copy, path)
        except _verification_errors() as error:
            raise TokenError(
                f"{where} was not signed with {public_key.name} as it is now: {_line(error)}. Do not use it."
            ) from error


def load_signed(folder: Path, public_key: Path) -> GuidelineToken:
    """Loads a token from the very bytes that the owner of a key signed.

    Raises:
        TokenError: it is damaged, not signed, or not signed with this key.
    """
    files = artifact_files(folder)
    if not (folder / SIGNATURE_FILE).is_file():
        raise TokenError(f"{folder} is not signed, but must be with {public_key.name}. Sign it: dagkit token sign")
    verify_signature(files, read_file(folder / SIGNATURE_FILE, MAX_SIGNATURE_BYTES), public_key, str(folder))
    with _copy(files, folder.name) as copy:
        return GuidelineToken.load(copy)


@contextmanager
def _copy(files: Mapping[str, bytes], name: str) -> Iterator[Path]:
    """A folder with exactly these files, so that nothing else is signed and nothing changes meanwhile."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "files" / name
        folder.mkdir(parents=True)
        for file, data in files.items():
            (folder / file).write_bytes(data)
        yield folder


def _model_signing() -> tuple[Any, Any]:
    try:
        from model_signing import signing, verifying
    except ImportError as error:
        raise TokenError(
            f"signatures need model-signing, which is not installed ({error}). Run: pip install 'dagkit[sign]'"
        ) from error
    logging.getLogger("model_signing").setLevel(logging.ERROR)
    return signing, verifying


def _verification_errors() -> tuple[type[Exception], ...]:
    """What model-signing raises on a signature that is wrong, or is none."""
    from cryptography.exceptions import InvalidSignature
    from google.protobuf.json_format import Error as ProtobufError

    return (ValueError, TypeError, LookupError, AttributeError, RecursionError, InvalidSignature, ProtobufError)


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
