"""The sequences that a worker has, found by attempt, request or adapter without a look at the others."""

from collections.abc import Iterator

from gpu_worker.sequence import Sequence

_Key = tuple[str, ...]


class SequenceIndex:
    """Sequences by id; each of the groups lists them in the order in which they came."""

    def __init__(self) -> None:
        self._sequences: dict[str, Sequence] = {}
        # A group that is empty is not kept.
        self._groups: dict[_Key, dict[str, Sequence]] = {}

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences.values())

    def __getitem__(self, sequence_id: str) -> Sequence:
        return self._sequences[sequence_id]

    def get(self, sequence_id: str) -> Sequence | None:
        return self._sequences.get(sequence_id)

    def add(self, sequence: Sequence) -> None:
        self._sequences[sequence.sequence_id] = sequence
        for key in _keys(sequence):
            self._groups.setdefault(key, {})[sequence.sequence_id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """Raises KeyError when it is not here."""
        del self._sequences[sequence.sequence_id]
        for key in _keys(sequence):
            group = self._groups[key]
            del group[sequence.sequence_id]
            if not group:
                del self._groups[key]

    def of_attempt(self, attempt_id: str) -> list[Sequence]:
        """Outputs of one attempt."""
        return self._group("attempt", attempt_id)

    def of_request(self, tenant: str, request_id: str) -> list[Sequence]:
        """Outputs of all attempts at one request."""
        return self._group("request", tenant, request_id)

    def of_adapter(self, adapter_version: str) -> list[Sequence]:
        return self._group("adapter", adapter_version)

    def _group(self, *key: str) -> list[Sequence]:
        return list(self._groups.get(key, {}).values())


def _keys(sequence: Sequence) -> tuple[_Key, _Key, _Key]:
    return (
        ("attempt", sequence.attempt_id),
        ("request", sequence.tenant, sequence.request_id),
        ("adapter", sequence.adapter_version),
    )
