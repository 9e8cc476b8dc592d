"""Ids to text, token by token: the pieces together are what decoding all at once gives."""

import asyncio

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from gateway.detokenizer import REPLACEMENT, Detokenizer
from gateway.tokenization import TextTokenizer
from tests.gateway.fakes import VOCAB_SIZE, byte_tokenizer_files, token_ids
from tests.gateway.families import FAMILIES, tokenizer_of

BYTES = TextTokenizer(byte_tokenizer_files())
FAMILY = "👩‍👩‍👧‍👦"
TEXTS = st.text(max_size=30) | st.sampled_from(
    [FAMILY, "the quick  brown", " lead", "trail ", "\n\nuser: 東京", "a\u0301"]
)


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


def test_a_family_of_joined_emoji_comes_back() -> None:
    assert "".join(pushed_singly(BYTES, token_ids(FAMILY))) == FAMILY


def encoded(family: str, text: str) -> list[int]:
    return asyncio.run(tokenizer_of(family).encode(text))


@pytest.mark.parametrize("family", FAMILIES)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4), special=st.booleans())
def test_every_family_gives_what_decoding_at_once_gives(family: str, texts: list[str], special: bool) -> None:
    tokenizer = tokenizer_of(family)
    separator = encoded(family, "</s>") if special else []
    ids = [token for text in texts for token in [*encoded(family, text), *separator]]
    pieces = pushed_singly(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert any(REPLACEMENT in text for text in texts) or all(REPLACEMENT not in piece for piece in pieces)


@pytest.mark.parametrize("family", FAMILIES)
@given(text=TEXTS, cut=st.integers(1, 40))
def test_a_continued_text_is_the_rest_of_the_whole(family: str, text: str, cut: int) -> None:
    tokenizer = tokenizer_of(family)
    ids = encoded(family, f"go {text}")
    prompt = tokenizer.decode(ids[:cut])
    assume(cut < len(ids) and REPLACEMENT not in prompt + text)
    detokenizer = Detokenizer(tokenizer, ids[:cut])
    assert prompt + detokenizer.push(ids[cut:]) + detokenizer.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("family", ["llama 2", "mistral"])
def test_the_space_in_front_of_a_continued_text_is_kept(family: str) -> None:
    tokenizer, ids = tokenizer_of(family), encoded(family, "hello hello")
    half = len(ids) // 2
    assert ids[:half] == ids[half:]
    assert Detokenizer(tokenizer, ids[:half]).push(ids[half:]) == " hello"
    assert Detokenizer(tokenizer).push(ids[half:]) == "hello"


def test_a_prompt_that_ends_within_a_character_is_no_context() -> None:
    smile = token_ids("😀")
    detokenizer = Detokenizer(BYTES, smile[:2])
    assert detokenizer.push(token_ids("a")) == "a"
