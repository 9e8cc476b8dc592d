"""The demo's tokenizer: one token per UTF-8 byte, in the file format every Hugging Face loader reads.

Ids 0, 1, 2 are padding, begin and end of sequence; byte `b` is id `b + 3`. It is a BPE model without merges over
GPT-2's printable byte alphabet, so no text is unknown to it. A text that spells a special token, such as `</s>`,
becomes that token unless the loaded tokenizer's `encode_special_tokens` is set.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

SPECIAL_TOKENS = PAD, BOS, EOS = "<pad>", "<s>", "</s>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
BYTE_OFFSET = 3
VOCAB_SIZE = BYTE_OFFSET + 256
MAX_POSITIONS = 128


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in of each byte: visible Latin-1 characters stand for themselves."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in visible else next(stand_ins)) for byte in range(256)]


def token_ids(text: str) -> list[int]:
    """Ids of the text's bytes, without begin or end of sequence."""
    return [byte + BYTE_OFFSET for byte in text.encode()]


def build_tokenizer() -> Tokenizer:
    vocab = {PAD: PAD_ID, BOS: BOS_ID, EOS: EOS_ID}
    vocab |= {char: BYTE_OFFSET + byte for byte, char in enumerate(byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return tokenizer


def save_tokenizer(directory: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
