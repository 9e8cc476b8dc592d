"""Hashes by which requests with the same beginning are known, without anybody showing it."""

import hashlib
from array import array
from collections.abc import Sequence

# A hash for each so many tokens; a shorter rest has none.
CHUNK_TOKENS = 16
# Later tokens of a long prompt are not told apart: whoever shares that much shares enough.
MAX_HASHES = 256


def prefix_hashes(adapter_version: str, isolation_salt: str, token_ids: Sequence[int]) -> list[int]:
    """64-bit hashes of each CHUNK_TOKENS of a prompt together with everything that decides its KV before it.

    Equal hashes mean, but for one case in 2**64, the same adapter, salt and tokens up to there: a hint for placement,
    never a key of a cache.
    """
    # The length keeps (adapter, salt) from being read in two ways.
    chain = hashlib.blake2b(f"{len(adapter_version)}:{adapter_version}{isolation_salt}".encode(), digest_size=8)
    hashes = []
    for start in range(0, min(len(token_ids), MAX_HASHES * CHUNK_TOKENS) - CHUNK_TOKENS + 1, CHUNK_TOKENS):
        chain.update(array("I", token_ids[start : start + CHUNK_TOKENS]).tobytes())
        hashes.append(int.from_bytes(chain.digest(), "little"))
    return hashes
