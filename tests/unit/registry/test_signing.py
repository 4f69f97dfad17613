"""Signatures with keys of one's own, checked by model-signing itself."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_signing import verifying

from dagkit import registry
from dagkit.errors import TokenError
from dagkit.registry.index import SIGNATURE_FILE
from dagkit.registry.signing import artifact_files, verify_signature
from small_tokens import save_small_token, seal


def write_keys(folder: Path, name: str, *, password: bytes | None = None) -> tuple[Path, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / f"{name}.pem").write_bytes(key.private_bytes(pem, pkcs8, encryption))
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pub").write_bytes(public)
    return folder / f"{name}.pem", folder / f"{name}.pub"


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with keys ``own`` and ``other``, and a token that is signed with ``own``."""
    folder = tmp_path_factory.mktemp("signed")
    private, _ = write_keys(folder, "own")
    write_keys(folder, "other")
    registry.sign(save_small_token(folder), private)
    return folder


def test_signed_token_loads_with_its_key_only(signed: Path):
    token = registry.load_token(signed / "weapon" / "1.0.0", public_key=signed / "own.pub")
    assert token.name == "weapon@1.0.0"

    with pytest.raises(TokenError, match=r"was not signed with other.pub as it is now: Key mismatch"):
        registry.load_token(signed / "weapon" / "1.0.0", public_key=signed / "other.pub")


def test_model_signing_verifies_it_without_dagkit(signed: Path):
    config = verifying.Config().use_elliptic_key_verifier(public_key=signed / "own.pub")
    folder = signed / "weapon" / "1.0.0"
    config.set_ignore_unsigned_files(True).verify(folder, folder / SIGNATURE_FILE)


def test_a_changed_token_with_new_sums_is_not_the_signed_one(signed: Path, tmp_path: Path):
    folder = save_small_token(tmp_path)
    (folder / SIGNATURE_FILE).write_bytes((signed / "weapon" / "1.0.0" / SIGNATURE_FILE).read_bytes())
    (folder / "README.md").write_text("changed")
    seal(folder)

    assert registry.load_token(folder).name == "weapon@1.0.0"  # whole, but not what was signed
    with pytest.raises(TokenError, match=r"Signature mismatch.*README.md"):
        registry.load_token(folder, public_key=signed / "own.pub")


def test_unsigned_token_is_refused_where_a_key_is_given(signed: Path, tmp_path: Path):
    with pytest.raises(TokenError, match=r"is not signed, but must be with own.pub. Sign it: dagkit token sign"):
        registry.load_token(save_small_token(tmp_path), public_key=signed / "own.pub")


def test_signing_twice_or_a_damaged_token_is_refused(signed: Path, tmp_path: Path):
    with pytest.raises(TokenError, match=r"model.sig exists: the token is signed already"):
        registry.sign(signed / "weapon" / "1.0.0", signed / "own.pem")
    folder = save_small_token(tmp_path)
    (folder / "README.md").write_text("changed")
    with pytest.raises(TokenError, match=r"README.md was changed after it was written"):
        registry.sign(folder, signed / "own.pem")
    assert not (folder / SIGNATURE_FILE).exists()


def test_keys_with_passwords(tmp_path: Path):
    private, public = write_keys(tmp_path, "own", password=b"open sesame")
    folder = save_small_token(tmp_path)
    for wrong in (None, "guessed"):
        with pytest.raises(TokenError, match=r"own.pem cannot sign: .*password") as refused:
            registry.sign(folder, private, wrong)
        assert "guessed" not in str(refused.value)

    registry.sign(folder, private, "open sesame")
    assert registry.load_token(folder, public_key=public).version == "1.0.0"


def test_keys_that_are_none(signed: Path, tmp_path: Path):
    folder = save_small_token(tmp_path)
    key = rsa.generate_private_key(65537, 2048)
    pem, none = serialization.Encoding.PEM, serialization.NoEncryption()
    (tmp_path / "rsa.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, none))
    (tmp_path / "text.pub").write_text("no key")

    for name in ("rsa.pem", "text.pub"):
        with pytest.raises(TokenError, match=r"cannot sign: .*Expected the PEM file of a P-256, P-384 or P-521 key"):
            registry.sign(folder, tmp_path / name)
    with pytest.raises(TokenError, match=r"none.pem: no such key. Make one with: openssl"):
        registry.sign(folder, tmp_path / "none.pem")
    for name, message in [("text.pub", "is not the public key of"), ("none.pub", "no such key. Give the signer's")]:
        with pytest.raises(TokenError, match=message):
            registry.load_token(signed / "weapon" / "1.0.0", public_key=tmp_path / name)


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_a_signature_is_refused(signed: Path, data: st.DataObject):
    folder = signed / "weapon" / "1.0.0"
    signature = bytearray((folder / SIGNATURE_FILE).read_bytes())
    position = data.draw(st.integers(0, len(signature) - 1))
    if data.draw(st.booleans()):
        signature[position] ^= data.draw(st.integers(1, 255))
    else:
        del signature[position : position + data.draw(st.integers(1, 200))]
    files = artifact_files(folder)
    try:
        verify_signature(files, bytes(signature), signed / "own.pub", "token")
    except TokenError:
        return
    with pytest.raises(TokenError):  # the damage was harmless, so the signature still covers the files
        verify_signature({**files, "README.md": b"other"}, bytes(signature), signed / "own.pub", "token")


@pytest.mark.parametrize("signature", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"dsseEnvelope": 1}'])
def test_what_is_no_signature(signed: Path, signature: bytes):
    with pytest.raises(TokenError, match=r"token was not signed with own.pub as it is now"):
        verify_signature(artifact_files(signed / "weapon" / "1.0.0"), signature, signed / "own.pub", "token")
