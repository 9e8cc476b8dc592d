"""Seconds it takes to bring something back into pages, as measured on this worker."""

from collections import OrderedDict

from gpu_worker.memory.demand import MAX_KNOWN_ADAPTERS

# Until something was measured: a memory copy, and a small model on a CPU.
_PRIOR_LOAD_SECONDS_PER_BYTE = 1e-9
_PRIOR_PREFILL_SECONDS_PER_TOKEN = 1e-3
# A new measurement counts this much against all before it.
_WEIGHT = 0.2


class CostModel:
    """Moving averages of load seconds per adapter and of prefill seconds per token."""

    def __init__(self) -> None:
        # digest -> seconds; measured longest ago first
        self._load_seconds: OrderedDict[str, float] = OrderedDict()
        self._load_seconds_per_byte = _PRIOR_LOAD_SECONDS_PER_BYTE
        self.prefill_seconds_per_token = _PRIOR_PREFILL_SECONDS_PER_TOKEN

    def loaded(self, adapter_version: str, num_bytes: int, seconds: float) -> None:
        """Bringing the adapter into pages took `seconds`."""
        before = self._load_seconds.get(adapter_version, seconds)
        self._load_seconds[adapter_version] = _moved(before, seconds)
        self._load_seconds.move_to_end(adapter_version)
        if len(self._load_seconds) > MAX_KNOWN_ADAPTERS:
            self._load_seconds.popitem(last=False)
        self._load_seconds_per_byte = _moved(self._load_seconds_per_byte, seconds / max(1, num_bytes))

    def prefilled(self, num_tokens: int, seconds: float) -> None:
        """Computing `num_tokens` of prompts took `seconds`."""
        self.prefill_seconds_per_token = _moved(self.prefill_seconds_per_token, seconds / num_tokens)

    def load_seconds(self, adapter_version: str, num_bytes: int) -> float:
        """As measured for this adapter, else what its bytes would take."""
        return self._load_seconds.get(adapter_version, self._load_seconds_per_byte * num_bytes)


def _moved(average: float, measured: float) -> float:
    return average + _WEIGHT * (measured - average)
