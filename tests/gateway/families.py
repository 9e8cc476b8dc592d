"""Small tokenizers of every kind that the model families use, trained on a few sentences."""

import json
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from gateway.tokenization import TextTokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog", "user: hello\n\nassistant: hi there", "naïve café 東京 🙂"] * 3
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
# The pre-tokenisers of Llama 3 and of Qwen 2 differ in how many digits stay together.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FAMILIES = ("llama 2", "mistral", "llama 3", "qwen 2")


@cache
def tokenizer_of(family: str) -> TextTokenizer:
    return TextTokenizer({"tokenizer.json": tokenizer_json(family).encode()})


def tokenizer_json(family: str) -> str:
    match family:
        case "llama 2":
            prepend = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            tokenizer = _sentence_piece()
            tokenizer.normalizer = normalizers.Sequence(prepend)
        case "mistral":
            tokenizer = _sentence_piece()
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        case "llama 3":
            tokenizer = _byte_level("{1,3}")
        case _:
            tokenizer = _byte_level("")
            tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return str(tokenizer.to_str())


def _sentence_piece() -> Tokenizer:
    """Words that begin with their space, and bytes for what is no word."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    # Without the characters beyond ASCII, so that they become bytes.
    words = [word for word in model["vocab"] if all(character.isascii() or character == "▁" for character in word)]
    vocab = {word: index for index, word in enumerate([*SPECIAL_TOKENS, *BYTE_TOKENS, *words])}
    merges = [tuple(pair) for pair in model["merges"] if "".join(pair) in vocab and set(pair) <= vocab.keys()]
    bpe = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _byte_level(digits: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS % digits), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer
