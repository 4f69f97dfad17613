"""Words that textual inversions added to a pipeline: they are no part of the base model, and none of the guard's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from dagkit.errors import ModelError


def own_embeddings(pipe: Any) -> dict[nn.Module, int]:
    """Embedding layer of each text encoder with a tokenizer -> its rows that a text of the base model can reach.

    Rows behind them are padding, or words that ``load_textual_inversion`` added.
    """
    found: dict[nn.Module, int] = {}
    for name, tokenizer in _tokenizers(pipe).items():
        encoder: Any = getattr(pipe, name.replace("tokenizer", "text_encoder"), None)
        if hasattr(encoder, "get_input_embeddings"):
            embedding = encoder.get_input_embeddings()
            embedding = getattr(embedding, "base_layer", embedding)  # beneath a LoRA
            found[embedding] = _vocabulary(tokenizer)
    return found


def check_words(pipe: Any, texts: Iterable[str]) -> None:
    """Refuses texts that a textual inversion gave another meaning.

    Args:
        pipe: a pipeline.
        texts: that must mean what they mean to the base model.

    Raises:
        ModelError: one holds an added word.
    """
    for tokenizer in _tokenizers(pipe).values():
        size = _vocabulary(tokenizer)
        for text in texts if size < len(tokenizer) else ():
            added = [token for token in tokenizer(text, truncation=True).input_ids if token >= size]
            if added:
                word = tokenizer.convert_ids_to_tokens(added[0])
                raise ModelError(
                    f"a textual inversion that is loaded has the word {word!r}, which stands in {text[:80]!r}, so that "
                    "the text would mean something else. Load the inversion under another word (token=...)."
                )


def _tokenizers(pipe: Any) -> dict[str, Any]:
    parts = getattr(pipe, "components", {})
    return {name: part for name, part in parts.items() if name.startswith("tokenizer") and hasattr(part, "__len__")}


def _vocabulary(tokenizer: Any) -> int:
    """How many tokens it had before words were added: those at the end that are ordinary text are none of its own."""
    size, tokens = len(tokenizer), getattr(tokenizer, "added_tokens_decoder", {})
    while size - 1 in tokens and not tokens[size - 1].special:
        size -= 1
    return size
