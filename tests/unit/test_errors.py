"""Messages stay short and printable, whatever came in."""

import pytest

from dagkit import errors
from dagkit.errors import MAX_MESSAGE, MAX_QUOTED, DagkitError, brief, quoted, reason

ALL = [error for error in vars(errors).values() if isinstance(error, type) and issubclass(error, DagkitError)]


def test_quotes_are_short_and_on_one_line():
    loop: list = []
    for _ in range(5000):
        loop = [loop]
    for value in (
        "x" * 50_000,
        "a\nb\x1b[31m\ud800",
        ["x"] * 50_000,
        {"k": "v" * 50_000},
        10**5000,
        loop,
        b"\0" * 9999,
    ):
        shown = quoted(value)
        assert len(shown) <= MAX_QUOTED + 40
        assert shown.isprintable()
    assert quoted("it's") == '"it\'s"'
    assert quoted("x" * 300) == f"'{'x' * MAX_QUOTED}... (300 characters)"
    assert quoted([1, 2]) == "[1, 2]"


def test_foreign_words_and_errors_are_cut():
    assert brief("a\n  b") == "a b"
    assert brief("x" * 50_000) == "x" * MAX_QUOTED + "..."
    assert reason(ValueError("first\nsecond")) == "first"
    assert reason(ValueError()) == "ValueError"
    assert len(reason(ValueError("x" * 50_000))) <= MAX_QUOTED + 3


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
def test_no_message_is_endless_or_moves_the_cursor(error: type[DagkitError]):
    message = str(error("begins\n" + "x" * 50_000 + "\x1b[2J\0\ud800 ends"))
    assert len(message) < MAX_MESSAGE + 100
    assert message.startswith("begins\n")
    assert message.endswith(r"\x1b[2J\x00\xd800 ends")
    assert "characters left out" in message
    assert message.encode()
    assert str(error("as it is")) == "as it is"


def test_what_to_install_for_a_module_that_is_missing():
    def advice(module: str) -> str:
        return str(errors.missing_package(ModuleNotFoundError(f"No module named {module!r}", name=module)))

    start = "this needs {0}, which is not installed. Run: pip install '{0}>="
    assert advice("scipy.ndimage").startswith(start.format("scipy"))
    assert advice("label_studio_sdk").startswith(start.format("label-studio-sdk"))
    assert advice("PIL").startswith(start.format("pillow"))
    assert advice("torchmetrics.image").startswith(start.format("torchmetrics"))  # of an extra
    for bug in ("dagkit.nowhere", "colections", ""):
        assert advice(bug) == "None"
    with pytest.raises(ModuleNotFoundError, match="colections"):
        errors.required("colections")
