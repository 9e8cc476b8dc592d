"""Bytes are those that were promised, or they are not."""

import hashlib

import pytest
from blake3 import blake3

from common.checksum import Checksum
from common.packing import PackedLayout

DATA = bytes(range(256)) * 100
SHA256, BLAKE3 = hashlib.sha256(DATA).hexdigest(), blake3(DATA).hexdigest()


def holds(promised: PackedLayout, *parts: bytes) -> bool:
    checksum = Checksum(promised)
    for part in parts:
        checksum.update(part)
    assert checksum.num_bytes == sum(map(len, parts))
    return checksum.holds()


def layout(**digests: str) -> PackedLayout:
    return PackedLayout("float32", len(DATA), (), **digests)


@pytest.mark.parametrize(
    "promised",
    [layout(sha256=SHA256, blake3=BLAKE3), layout(sha256=SHA256), layout(sha256="0" * 64, blake3=BLAKE3)],
    ids=["both", "an-old-layout", "the-quicker-one-counts"],
)
def test_the_promised_bytes_hold(promised: PackedLayout) -> None:
    assert holds(promised, DATA)
    assert holds(promised, DATA[:7], DATA[7:])


@pytest.mark.parametrize("promised", [layout(sha256=SHA256, blake3=BLAKE3), layout(sha256=SHA256), layout()])
def test_other_bytes_do_not(promised: PackedLayout) -> None:
    flipped = bytes([DATA[0] ^ 1]) + DATA[1:]
    for other in (flipped, DATA[:-1], DATA + b"\0", DATA[1:] + DATA[:1], b""):
        assert not holds(promised, other)
