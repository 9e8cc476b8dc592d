"""The base model's tokenizer: text to token ids and back."""

import asyncio
from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer

from common.base_model import tokenizer_digest
from gateway.chat import ChatTemplates
from gateway.detokenizer import REPLACEMENT

# Encoding more characters than this takes milliseconds, which the event loop must not spend at once.
LONG_TEXT_CHARACTERS = 8_192


class TextTokenizer:
    """Known by the digest of its files."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """`files` by name. Raises ValueError when tokenizer.json is missing, or one of them cannot be read."""
        if "tokenizer.json" not in files:
            raise ValueError("there is no tokenizer.json among the tokenizer files")
        try:
            self._tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer.json cannot be read: {error}") from None
        # Some checkpoints were saved with the settings of their training.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.chat_templates = ChatTemplates.of_files(files)
        self.digest = tokenizer_digest(files)
        self._token_texts: dict[int, str] = {}

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with the special tokens of the tokenizer's own template unless the text has its own; long texts
        off the event loop."""
        if len(text) < LONG_TEXT_CHARACTERS:
            return self._encode(text, add_special_tokens)
        return await asyncio.to_thread(self._encode, text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # Of the library's calls only those for batches let go of the GIL.
        ids: list[int] = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def token_text(self, token_id: int) -> str:
        """What one token is inside of a text, special tokens by name; bytes that are no character are U+FFFD."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self._token_text(token_id)
        return text

    def _token_text(self, token_id: int) -> str:
        alone: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        if REPLACEMENT in alone:
            return alone
        # A SentencePiece decoder drops the space in front of a text, which only the second of two tokens shows.
        twice: str = self._tokenizer.decode([token_id, token_id], skip_special_tokens=False)
        return twice[len(alone) :]
