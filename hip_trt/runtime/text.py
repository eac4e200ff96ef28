"""Text from tokens, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStreamer:
    """Turns the tokens of one sequence into text that can be printed as it comes.

    A character whose bytes span tokens is held back until it is whole. Each piece costs the decoding of a few tokens,
    however long the sequence.

    Args:
        tokenizer: a transformers tokenizer.
        context: the last tokens before the first one pushed; some tokenizers write a leading space or not by what came
            before.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(context)
        self._printed = len(self._tokens)

    def push(self, token: int) -> str:
        """Add a token.

        Returns:
            The text that it completes, perhaps empty. Special tokens have no text.
        """
        self._tokens.append(token)
        piece = self._pending()
        if not piece or piece.endswith(_INCOMPLETE):
            return ""
        self._tokens = self._tokens[self._printed :]
        self._printed = len(self._tokens)
        return piece

    def finish(self) -> str:
        """The text still held back, with U+FFFD for bytes that never became a character."""
        piece = self._pending()
        self._printed = len(self._tokens)
        return piece

    def _pending(self) -> str:
        return self._decode(self._tokens)[len(self._decode(self._tokens[: self._printed])) :]

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text
