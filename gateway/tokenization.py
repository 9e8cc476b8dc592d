"""Text to token ids, and token ids back to text while they arrive."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Protocol

from tokenizers import Tokenizer

from common.base_model import tokenizer_digest

# Encoding more characters than this takes milliseconds, which the event loop must not spend at once.
LONG_TEXT_CHARACTERS = 8_192
# What a decoder writes for bytes that are no character, or not one yet.
REPLACEMENT = "\ufffd"
# A character has at most 4 bytes. A longer run of replacements is no unfinished character but bad output.
MAX_HELD_CHARACTERS = 8
# Bounds what is decoded again for each new token while bad output goes on.
MAX_WINDOW_TOKENS = 64


class Decoder(Protocol):
    """The half of a tokenizer that a Detokenizer needs."""

    def decode(self, ids: Sequence[int]) -> str: ...


class TextTokenizer:
    """The base model's tokenizer, known by the digest of its files."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """`files` by name. Raises ValueError when tokenizer.json is missing or cannot be read."""
        if "tokenizer.json" not in files:
            raise ValueError("there is no tokenizer.json among the tokenizer files")
        try:
            self._tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer.json cannot be read: {error}") from None
        self.digest = tokenizer_digest(files)

    async def encode(self, text: str) -> list[int]:
        """Token ids with the special tokens of the tokenizer's own template; long texts off the event loop."""
        if len(text) < LONG_TEXT_CHARACTERS:
            return self._encode(text)
        return await asyncio.to_thread(self._encode, text)

    def _encode(self, text: str) -> list[int]:
        # Of the library's calls only those for batches let go of the GIL.
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=True)[0].ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


class Detokenizer:
    """Text of one output as its tokens arrive. Holds back only a character whose bytes are not all there.

    Not `tokenizers.decoders.DecodeStream`: that one raises on a byte-fallback tokenizer when bytes are no character,
    and holds back a stream of such bytes for ever.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        # The last tokens; how they decode depends on their neighbours.
        self._window: list[int] = []
        # Tokens at the start of the window that are there as neighbours only.
        self._settled = 0
        # Characters of the decoded window that were returned already.
        self._returned = 0

    def push(self, ids: Sequence[int]) -> str:
        """The text these tokens add; the same in all whether they come one by one or together."""
        return "".join([self._push_one(token_id) for token_id in ids])

    def flush(self) -> str:
        """What was held back; for the end of the output."""
        text = self._decoder.decode(self._window)
        delta = text[self._returned :]
        self._returned = len(text)
        return delta

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
