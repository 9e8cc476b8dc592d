"""Equal beginnings have equal hashes, and nothing else has."""

from common.prefix_chain import CHUNK_TOKENS, MAX_HASHES, prefix_hashes


def test_prompts_share_hashes_as_far_as_they_share_whole_chunks() -> None:
    shared = list(range(3 * CHUNK_TOKENS))
    first = prefix_hashes("a", "t", [*shared, 7, *range(CHUNK_TOKENS)])
    second = prefix_hashes("a", "t", [*shared, 8, *range(CHUNK_TOKENS)])
    assert first[:3] == second[:3] == prefix_hashes("a", "t", shared)
    assert first[3] != second[3]


def test_adapter_and_salt_are_part_of_every_hash() -> None:
    tokens = list(range(2 * CHUNK_TOKENS))
    chains = [prefix_hashes(*names, tokens) for names in (("a", "t"), ("b", "t"), ("a", "u"), ("at", ""), ("", "at"))]
    assert len({number for chain in chains for number in chain}) == 10


def test_a_rest_has_no_hash_and_long_prompts_have_so_many() -> None:
    assert prefix_hashes("", "", [1] * (CHUNK_TOKENS - 1)) == []
    assert len(prefix_hashes("", "", [1] * (2 * CHUNK_TOKENS - 1))) == 1
    assert len(prefix_hashes("", "", [1] * (CHUNK_TOKENS * (MAX_HASHES + 9)))) == MAX_HASHES
