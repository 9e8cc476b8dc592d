"""A request while a worker has it."""

from dataclasses import dataclass, field
from enum import Enum, auto

from gpu_worker.memory.prefix_cache import PrefixKeys


class SequenceState(Enum):
    """WAITING holds no pages; LOADING holds pages and waits for its adapter; RUNNING may be in the next step."""

    WAITING = auto()
    LOADING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. Temperature 0 is greedy; 0, 1.0 or None switch the rest off."""

    temperature: float
    seed: int
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    # (token id, bias), by token id
    logit_bias: tuple[tuple[int, float], ...] = ()
    # Alternatives to report with each generated token; None reports nothing, not even the token itself.
    logprobs: int | None = None
    # The same for each prompt token.
    prompt_logprobs: int | None = None

    @property
    def adjusts(self) -> bool:
        """Logits change before temperature."""
        penalties = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        return bool(penalties or self.logit_bias)


@dataclass(frozen=True, slots=True)
class StoppingParams:
    """When an output ends. `stop_token_ids` includes the model's end-of-sequence ids unless they are ignored."""

    max_tokens: int
    min_tokens: int
    stop_token_ids: frozenset[int]


@dataclass(slots=True)
class Timings:
    """Points on this process's monotonic clock, in seconds; 0 means not reached."""

    offered: float = 0.0
    admitted: float = 0.0
    loaded: float = 0.0
    first_token: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position under the model itself, before penalties, temperature and filters."""

    token_id: int
    logprob: float
    # (token id, log-probability), the most likely first
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, progress and place in line of one output of one attempt at a request."""

    request_id: str
    attempt: int
    tenant: str
    gateway_id: str
    order_key: int
    prompt_token_ids: list[int]
    # Output tokens that an earlier attempt delivered, then those of this one.
    output_token_ids: list[int]
    num_delivered: int
    sampling: SamplingParams
    stopping: StoppingParams
    # The model's; no token is computed behind it.
    max_context_tokens: int = 2**31 - 1
    # Empty for the base model.
    adapter_version: str = ""
    # Only sequences of one salt and adapter share prefix pages.
    isolation_salt: str = ""
    # Of the packed string, as the offer says; 0 = not said.
    adapter_bytes: int = 0
    output_index: int = 0
    # Its gateway needs no token before the others: nobody reads them as they come, and none of them may end it there.
    whole: bool = False
    # Newest tokens that its gateway was not told.
    num_held: int = 0
    # All outputs of the attempt by index; a new one joins. Output 0 computes the prompt that the others share.
    outputs: "list[Sequence]" = field(default_factory=list)
    # Of the prompt tokens from the second on, as far as computed; in output 0 only.
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    # Prompt tokens that have log-probabilities or get them from a step in flight.
    described_tokens: int = 0
    state: SequenceState = SequenceState.WAITING
    # Tokens whose KV is in pages; and with those that a step in flight computes.
    computed_tokens: int = 0
    launched_tokens: int = 0
    # Tokens that steps in flight draw and nobody here knows yet.
    pending_tokens: int = 0
    # Prompt tokens that were in pages already when the sequence was first admitted.
    cached_tokens: int = 0
    # Of its full pages, as far as anybody asked.
    prefix_keys: PrefixKeys | None = None
    preemptions: int = 0
    timings: Timings = field(default_factory=Timings)

    # Unique in a worker: an old attempt and its successor may meet here. Kept because every step asks for them.
    attempt_id: str = field(init=False)
    sequence_id: str = field(init=False)

    def __post_init__(self) -> None:
        self.outputs.append(self)
        self.attempt_id = f"{self.tenant}/{self.request_id}/{self.attempt}"
        self.sequence_id = f"{self.attempt_id}/{self.output_index}"

    @property
    def finished(self) -> bool:
        return self.state is SequenceState.FINISHED

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Some are missing, and no step in flight brings them."""
        asked = self.sampling.prompt_logprobs is not None and self.output_index == 0
        return asked and self.described_tokens < len(self.prompt_token_ids) - 1

    @property
    def num_output_tokens(self) -> int:
        """With those that steps in flight draw."""
        return len(self.output_token_ids) + self.pending_tokens

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + self.num_output_tokens

    def is_full(self, num_output_tokens: int) -> bool:
        """No token may follow so many generated ones."""
        num_tokens = len(self.prompt_token_ids) + num_output_tokens
        return num_output_tokens >= self.stopping.max_tokens or num_tokens >= self.max_context_tokens

    def token_ids(self, start: int, end: int) -> list[int]:
        """Tokens `[start, end)` of prompt and output together, as far as they are known."""
        split = len(self.prompt_token_ids)
        if start >= split:
            return self.output_token_ids[start - split : end - split]
        return self.prompt_token_ids[start:end] + self.output_token_ids[: max(0, end - split)]
