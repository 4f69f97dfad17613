"""References are taken apart alike everywhere, and versions are chosen as Cargo and npm choose them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dagkit.errors import TokenError
from dagkit.registry.reference import Reference, choose, parse, parse_location
from dagkit.token.versions import is_version

VERSIONS = ["0.1.0", "0.2.0", "0.2.5", "1.0.0", "1.2.0", "1.2.9", "1.10.0", "2.0.0"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("weapon", Reference("weapon", name="weapon")),
        ("weapon@latest", Reference("weapon@latest", name="weapon")),
        ("weapon@1.2.0", Reference("weapon@1.2.0", name="weapon", wanted="1.2.0")),
        ("weapon@^1.2", Reference("weapon@^1.2", name="weapon", wanted="^1.2")),
        ("./weapon", Reference("./weapon", folder="./weapon")),
        ("tokens/weapon/1.0.0", Reference("tokens/weapon/1.0.0", folder="tokens/weapon/1.0.0")),
        ("~/tokens@home/a", Reference("~/tokens@home/a", folder="~/tokens@home/a")),
        (
            "file:///srv/a@b/weapon@^1",
            Reference("file:///srv/a@b/weapon@^1", url="file:///srv/a@b/weapon", wanted="^1"),
        ),
        ("hf://acme/w-1.5@1.0.0", Reference("hf://acme/w-1.5@1.0.0", url="hf://acme/w-1.5", wanted="1.0.0")),
        ("s3://bucket", Reference("s3://bucket", url="s3://bucket")),
        ("s3://bucket/a/b/@latest", Reference("s3://bucket/a/b/@latest", url="s3://bucket/a/b")),
    ],
)
def test_parse(text: str, expected: Reference):
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' does not name a token. Expected a folder"),
        ("Weapon", "'Weapon' does not name a token"),
        ("weapon\n@1.0.0", "does not name a token"),
        ("weapon@", "expected a version such as 1.2.0, \\^1.2 or latest, but got ''"),
        ("weapon@1.2", "but got '1.2'. Did you mean '\\^1.2'\\?"),
        ("weapon@v1.2.0", "but got 'v1.2.0'. Did you mean '1.2.0'\\?"),
        ("weapon@lastest", "but got 'lastest'. Did you mean 'latest'\\?"),
        ("weapon@01.0.0", "expected a version"),
        ("weapon@^1.2.3.4", "expected a version"),
        ("ftp://host/weapon", "'ftp' is no place for tokens. Use one of hf://, s3://, file://"),
        ("hff://a/b", "Did you mean 'hf'\\?"),
        ("hf://weapon@1.0.0", "Expected hf://org/name"),
        ("hf://a/../b@1.0.0", "Expected hf://org/name"),
        ("file://relative/x", "Expected file:///folder"),
        ("file:///a/../b@^1", "Expected file:///folder"),
        ("s3:///prefix", "Expected s3://bucket/prefix"),
        ("s3://bucket/../x", "Expected s3://bucket/prefix"),
        ("s3://bucket/x?versionId=1", "Expected s3://bucket/prefix"),
    ],
)
def test_what_names_no_token(text: str, message: str):
    with pytest.raises(TokenError, match=message):
        parse(text)


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_refused(text: str):
    try:
        reference = parse(text)
    except TokenError:
        return
    assert [reference.folder, reference.name, reference.url].count(None) == 2


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("latest", "2.0.0"),
        ("1.2.0", "1.2.0"),
        ("1.2.1", None),
        ("^1", "1.10.0"),
        ("^1.2", "1.10.0"),
        ("^1.2.1", "1.10.0"),
        ("^1.11", None),
        ("^0", "0.2.5"),
        ("^0.2", "0.2.5"),
        ("^0.2.1", "0.2.5"),
        ("^0.1", "0.1.0"),
        ("^0.0", None),
        ("^3", None),
    ],
)
def test_choose(wanted: str, expected: str | None):
    assert choose(wanted, VERSIONS) == expected


def test_versions_are_three_plain_numbers():
    good = ["0.0.0", "1.10.0", "999999.0.0"]
    bad = ["1", "1.0", "1.0.0.0", "01.0.0", "1.0.0-rc1", "v1.0.0", "1.0.0\n", "1234567.0.0", "", "../1"]

    assert [text for text in good + bad if is_version(text)] == good


def test_locations_have_no_version():
    assert parse_location("s3://bucket/a/") == "s3://bucket/a"
    with pytest.raises(TokenError, match=r"expected a place without a version. Write hf://a/b\."):
        parse_location("hf://a/b@1.0.0")
    with pytest.raises(TokenError, match=r"'weapon' is not a place for tokens. Expected hf://org/name"):
        parse_location("weapon")
