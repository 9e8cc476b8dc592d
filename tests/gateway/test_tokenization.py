"""Text to ids and back, token by token."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from gateway.answers import AnswerWriter, merge
from gateway.requests import Delta, OutputDelta
from gateway.detokenizer import REPLACEMENT, Detokenizer
from gateway.tokenization import LONG_TEXT_CHARACTERS, TextTokenizer
from loraplex.v1 import types_pb2
from tests.gateway.fakes import VOCAB_SIZE, byte_tokenizer_files, token_ids

BYTES = TextTokenizer(byte_tokenizer_files())
FAMILY = "👩‍👩‍👧‍👦"


def fallback_tokenizer() -> TextTokenizer:
    """A SentencePiece-like tokenizer: words, and byte tokens for what is no word."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁hello", "▁", "w"]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return TextTokenizer({"tokenizer.json": tokenizer.to_str().encode()})


FALLBACK = fallback_tokenizer()
HELLO = 259


def pushed_singly(tokenizer: TextTokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push([token]) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("é", ["", "é", ""], id="two bytes"),
        pytest.param("€a", ["", "", "€", "a", ""], id="three bytes"),
        pytest.param("😀", ["", "", "", "😀", ""], id="four bytes"),
    ],
)
def test_a_character_comes_when_it_is_whole(text: str, expected: list[str]) -> None:
    assert pushed_singly(BYTES, token_ids(text)) == expected


def test_what_is_whole_does_not_wait_for_what_is_not() -> None:
    detokenizer = Detokenizer(BYTES)
    assert detokenizer.push(token_ids("abc😀")[:-1]) == "abc"
    assert detokenizer.push(token_ids("😀")[-1:]) == "😀"


@given(st.text())
def test_valid_text_comes_back(text: str) -> None:
    pieces = pushed_singly(BYTES, token_ids(text))
    assert "".join(pieces) == text
    assert REPLACEMENT in text or all(REPLACEMENT not in piece for piece in pieces)


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=200))
def test_any_tokens_give_what_decoding_them_at_once_gives(ids: list[int]) -> None:
    assert "".join(pushed_singly(BYTES, ids)) == BYTES.decode(ids)


@given(st.lists(st.integers(0x80 + 3, 0xFF + 3), max_size=300))
def test_bytes_that_are_no_characters_are_not_held_for_ever(ids: list[int]) -> None:
    detokenizer = Detokenizer(BYTES)
    text = "".join(detokenizer.push([token]) for token in ids)
    whole = BYTES.decode(ids)
    assert len(whole) - len(text) <= 8
    assert text + detokenizer.flush() == whole


@given(st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=9), max_size=9))
def test_the_text_does_not_depend_on_how_tokens_come_together(chunks: list[list[int]]) -> None:
    detokenizer = Detokenizer(BYTES)
    text = "".join([*(detokenizer.push(chunk) for chunk in chunks), detokenizer.flush()])
    assert text == BYTES.decode([token for chunk in chunks for token in chunk])


@given(st.text(max_size=30))
def test_byte_fallback_text_comes_back(text: str) -> None:
    ids = [HELLO, *token_ids(text), HELLO]
    assert "".join(pushed_singly(FALLBACK, ids)) == f"hello{text} hello"


@given(st.lists(st.integers(0, HELLO + 2), max_size=100))
def test_byte_fallback_takes_any_tokens(ids: list[int]) -> None:
    pushed_singly(FALLBACK, ids)


def test_special_tokens_are_not_text() -> None:
    assert "".join(pushed_singly(BYTES, [1, *token_ids("a"), 0, *token_ids("b"), 2])) == "ab"


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


def writer(*, return_token_ids: bool) -> AnswerWriter:
    output = types_pb2.OutputParams(n=1, return_token_ids=return_token_ids)
    return AnswerWriter(types_pb2.RequestSpec(output=output), BYTES)


def delta(offset: int, ids: list[int], *, finish: bool = False) -> Delta:
    output = OutputDelta(0, offset, ids)
    if finish:
        output.finish_reason = types_pb2.FINISH_REASON_STOP
    return Delta([output], types_pb2.Usage() if finish else None)


def test_a_message_without_whole_text_waits_for_the_next() -> None:
    answers = writer(return_token_ids=False)
    smile = token_ids("😀")
    assert answers.write(delta(0, smile[:2])) is None
    response = answers.write(delta(2, smile[2:]))
    assert response is not None
    assert (response.outputs[0].text, response.outputs[0].token_offset) == ("😀", 0)
    after = answers.write(delta(4, token_ids("!")))
    assert after is not None
    assert after.outputs[0].token_offset == 4


def test_token_ids_do_not_wait_for_whole_text() -> None:
    answers = writer(return_token_ids=True)
    smile = token_ids("😀")
    response = answers.write(delta(0, smile[:2]))
    assert response is not None
    assert (response.outputs[0].text, list(response.outputs[0].token_ids)) == ("", smile[:2])


def test_the_last_message_has_what_was_held() -> None:
    answers = writer(return_token_ids=False)
    assert answers.write(delta(0, token_ids("é")[:1])) is None
    response = answers.write(delta(1, [], finish=True))
    assert response is not None
    assert response.outputs[0].text == REPLACEMENT


@given(st.lists(st.text(max_size=5), min_size=1, max_size=5))
def test_merged_messages_are_the_whole(texts: list[str]) -> None:
    answers = writer(return_token_ids=True)
    ids = [token_ids(text) for text in texts]
    deltas = [delta(0, part) for part in ids] + [delta(0, [], finish=True)]
    written = [answers.write(part) for part in deltas]
    whole = merge([response for response in written if response is not None])
    assert whole.outputs[0].text == "".join(texts)
    assert whole.outputs[0].token_ids == [token for part in ids for token in part]
    assert whole.outputs[0].finish.reason == types_pb2.FINISH_REASON_STOP
    assert whole.HasField("usage")


def test_a_family_of_joined_emoji_comes_back() -> None:
    assert "".join(pushed_singly(BYTES, token_ids(FAMILY))) == FAMILY
