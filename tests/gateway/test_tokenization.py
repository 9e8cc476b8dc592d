"""Text to ids, and the text of single tokens."""

import asyncio
import json

import pytest

from gateway.detokenizer import REPLACEMENT
from gateway.tokenization import LONG_TEXT_CHARACTERS, TextTokenizer
from tests.gateway.fakes import byte_tokenizer_files, token_ids
from tests.gateway.families import FAMILIES, tokenizer_json, tokenizer_of

BYTES = TextTokenizer(byte_tokenizer_files())


@pytest.mark.parametrize("text", ["hi", "hi" * LONG_TEXT_CHARACTERS], ids=["short", "long"])
async def test_text_becomes_ids_with_special_tokens(text: str) -> None:
    assert await BYTES.encode(text) == [1, *token_ids(text)]


async def test_a_long_text_leaves_the_loop_free() -> None:
    encoding = asyncio.create_task(BYTES.encode("a" * 1_000_000))
    turns = 0
    while not encoding.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 10


@pytest.mark.parametrize(
    "files",
    [
        pytest.param({}, id="missing"),
        pytest.param({"tokenizer.json": b"{}"}, id="no model"),
        pytest.param({"tokenizer.json": b"\xff"}, id="no text"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_a_value_error(files: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        TextTokenizer(files)


async def test_rendered_text_becomes_ids_without_special_tokens() -> None:
    assert await BYTES.encode("hi", add_special_tokens=False) == token_ids("hi")


async def test_settings_of_the_training_are_not_used() -> None:
    saved = json.loads(byte_tokenizer_files()["tokenizer.json"])
    saved["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    saved["padding"] = {
        "strategy": {"Fixed": 99},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    tokenizer = TextTokenizer({"tokenizer.json": json.dumps(saved).encode()})
    assert await tokenizer.encode("abcdef") == [1, *token_ids("abcdef")]


@pytest.mark.parametrize("family", FAMILIES)
async def test_the_texts_of_tokens_together_are_the_text(family: str) -> None:
    tokenizer = tokenizer_of(family)
    ids = await tokenizer.encode("the quick brown fox")
    assert "".join(map(tokenizer.token_text, ids)).lstrip(" ") == "the quick brown fox"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_special_token_has_its_name(family: str) -> None:
    vocab = json.loads(tokenizer_json(family))["added_tokens"]
    end = next(token["id"] for token in vocab if token["content"] == "</s>")
    assert tokenizer_of(family).token_text(end) == "</s>"


def test_a_byte_that_is_no_character_is_a_replacement() -> None:
    assert BYTES.token_text(token_ids("é")[0]) == REPLACEMENT
