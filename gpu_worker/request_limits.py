"""What can never be served here, said when it arrives and with the numbers."""

from common.errors import FailedPrecondition, InvalidArgument, LoraplexError
from gpu_worker.memory.manager import MemoryManager
from gpu_worker.sequence import Sequence


class RequestLimits:
    """The model's context and vocabulary, and the pool less what operators pinned."""

    def __init__(self, memory: MemoryManager, *, max_context_tokens: int, vocab_size: int) -> None:
        self._memory = memory
        self.max_context_tokens = max_context_tokens
        self._vocab_size = vocab_size

    def unusable_tokens(self, sequence: Sequence) -> LoraplexError | None:
        """What a gateway should have refused: it would break the whole batch."""
        if not 1 <= sequence.num_tokens <= self.max_context_tokens:
            message = f"the request has {sequence.num_tokens} tokens; the model takes 1 to {self.max_context_tokens}"
            return InvalidArgument("PROMPT_LENGTH", message)
        if (largest := max(sequence.token_ids(0, sequence.num_tokens))) >= self._vocab_size:
            message = f"token id {largest} is not in the vocabulary of {self._vocab_size}"
            return InvalidArgument("UNKNOWN_TOKEN", message)
        return None

    def never_fits(self, sequence: Sequence, adapter_bytes: int) -> LoraplexError | None:
        """Its whole length and an adapter of so many bytes exceed the pool: waiting for pages would be for ever."""
        geometry = self._memory.geometry
        most = min(len(sequence.prompt_token_ids) + sequence.stopping.max_tokens, self.max_context_tokens)
        kv, adapter = geometry.pages_for_tokens(most), geometry.pages_for_bytes(adapter_bytes)
        pinned = self._memory.adapters.operator_pinned_pages(excluding=sequence.adapter_version)
        if kv + adapter <= self._memory.num_pages - pinned:
            return None
        others = f", of which operators pinned {pinned} for other adapters" if pinned else ""
        message = (
            f"the request needs {kv} pages for {most} tokens and {adapter} for its adapter; "
            f"the pool has {self._memory.num_pages}{others}"
        )
        return FailedPrecondition("REQUEST_TOO_LARGE", message)
