"""Token ids of one output back to text while they arrive."""

from collections.abc import Sequence
from typing import Protocol

# What a decoder writes for bytes that are no character, or not one yet.
REPLACEMENT = "\ufffd"
# A character has at most 4 bytes. A longer run of replacements is no unfinished character but bad output.
MAX_HELD_CHARACTERS = 8
# Bounds what is decoded again for each new token while bad output goes on.
MAX_WINDOW_TOKENS = 64
# Of the prompt: enough to tell whether the output starts in the middle of a text. With the 3 bytes of an unfinished
# character they stay below MAX_HELD_CHARACTERS, whatever a byte-fallback decoder makes of them.
MAX_CONTEXT_TOKENS = 4


class Decoder(Protocol):
    """The half of a tokenizer that a Detokenizer needs."""

    def decode(self, ids: Sequence[int]) -> str: ...


class Detokenizer:
    """Text of one output as its tokens arrive. Holds back only a character whose bytes are not all there.

    Not `tokenizers.decoders.DecodeStream`: that one raises on a byte-fallback tokenizer when bytes are no character,
    and holds back a stream of such bytes for ever.
    """

    def __init__(self, decoder: Decoder, context: Sequence[int] = ()) -> None:
        """`context` are the tokens in front of the output when both are one text: a SentencePiece decoder drops the
        space in front of the first word of a text only."""
        self._decoder = decoder
        # The last tokens; how they decode depends on their neighbours.
        self._window: list[int] = []
        # Tokens at the start of the window that are there as neighbours only.
        self._settled = 0
        # Characters of the decoded window that were returned already.
        self._returned = 0
        self._start_after(list(context[-MAX_CONTEXT_TOKENS:]))

    def push(self, ids: Sequence[int]) -> str:
        """The text these tokens add; the same in all whether they come one by one or together."""
        return "".join([self._push_one(token_id) for token_id in ids])

    def flush(self) -> str:
        """What was held back; for the end of the output."""
        text = self._decoder.decode(self._window)
        delta = text[self._returned :]
        self._returned = len(text)
        return delta

    def _start_after(self, context: list[int]) -> None:
        """Keeps what decodes to whole characters: the tail may begin or end within one."""
        while context:
            text = self._decoder.decode(context)
            if text and REPLACEMENT not in text:
                self._window, self._settled, self._returned = context, len(context), len(text)
                return
            context = context[1:]

    def _push_one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decoder.decode(self._window)
        whole = text.rstrip(REPLACEMENT)
        if len(text) - len(whole) > MAX_HELD_CHARACTERS:
            whole = text[:-1]
        delta = whole[self._returned :]
        self._returned = max(self._returned, len(whole))
        if whole == text:
            self._restart(self._window[self._settled :])
        elif len(self._window) > MAX_WINDOW_TOKENS:
            self._shorten()
        return delta

    def _restart(self, window: list[int]) -> None:
        """Everything is returned: only these newest tokens are needed as neighbours of the next."""
        text = self._decoder.decode(window)
        if text:
            self._window, self._settled, self._returned = window, len(window), len(text)

    def _shorten(self) -> None:
        """Keeps the tokens that can hold the unfinished character at the end."""
        window = self._window[-MAX_HELD_CHARACTERS:]
        text = self._decoder.decode(window)
        if text:
            self._window, self._settled = window, 0
            self._returned = len(text) - text.endswith(REPLACEMENT)
