"""The words that the bundled base model knows."""

from __future__ import annotations

import re
from typing import Any, Final

from dagkit.demo.world import BACKGROUNDS, CLASSES

VOCABULARY: Final = (*CLASSES, *BACKGROUNDS, "a", "and", "on", "in", "danger", "weapon", ",")
_WORD: Final = re.compile(r"[^\W\d_]+|\d|[^\s\w]+|_+")


def is_bundled(tokenizer: Any) -> bool:
    """Whether a tokenizer is the bundled model's: it has every word of the world as one token, and few others."""
    vocabulary = tokenizer.get_vocab() if tokenizer is not None else {}
    return len(vocabulary) < 3 * len(VOCABULARY) + 60 and all(f"{word}</w>" in vocabulary for word in VOCABULARY)


def unknown_words(tokenizer: Any, prompt: str) -> list[str]:
    """Words of a prompt that the bundled model never met, in order and once each; none for any other tokenizer."""
    if not is_bundled(tokenizer):
        return []
    words = dict.fromkeys(word.lower() for word in _WORD.findall(prompt))
    return [word for word in words if word not in VOCABULARY]
