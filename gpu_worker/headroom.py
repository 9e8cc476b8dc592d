"""Whether a newcomer would soon take pages from those who run: then it waits instead of being preempted later.

The peak-token rule of S-LoRA and LightLLM: sort sequences by the tokens they still have to come; when the k-th of them
ends, the k with as many or more are all still there, each longer by what the k-th had to come. Pages are short if the
largest of these sums exceeds what there is. How many tokens come is learned: the share of `max_tokens` really used.
"""

from collections.abc import Iterable

from gpu_worker.sequence import Sequence

# A sequence that ended, or was preempted, counts this much against all before it.
_WEIGHT = 0.1


class Headroom:
    """Starts by expecting nothing to come, so that admission is bold until lengths are known."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._share = 0.0

    def ended(self, sequence: Sequence) -> None:
        """The sequence has all its tokens."""
        used = len(sequence.output_token_ids) / max(1, sequence.stopping.max_tokens)
        self._share += _WEIGHT * (min(1.0, used) - self._share)

    def preempted(self) -> None:
        """Less came than there was room for: more is expected from now on."""
        self._share += _WEIGHT * (1.0 - self._share)

    def suffices(self, sequences: Iterable[Sequence], num_pages: int) -> bool:
        """`num_pages` pages hold the KV of `sequences` until each of them ends, if lengths are as expected."""
        expected = sorted(((self._to_come(seq), self._pages(seq.num_tokens)) for seq in sequences), reverse=True)
        held = 0
        for number, (to_come, pages) in enumerate(expected, start=1):
            held += pages
            if held + number * self._pages(to_come) > num_pages:
                return False
        return True

    def _to_come(self, sequence: Sequence) -> int:
        """Tokens."""
        expected = round(self._share * sequence.stopping.max_tokens)
        return max(0, expected - len(sequence.output_token_ids))

    def _pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)
