"""What a step computed: tensors while it runs, plain values when somebody asks."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gpu_worker.batching import Chunk
from gpu_worker.logprobs import Described
from gpu_worker.sequence import TokenLogprobs
from gpu_worker.transfer import Download


@dataclass(frozen=True, slots=True)
class Draw:
    """The token drawn for one sequence, and its log-probabilities when they were asked for.

    The token means nothing when the row was not `finite`: a logit was NaN, or the largest was infinite.
    """

    token_id: int
    logprobs: TokenLogprobs | None = None
    finite: bool = True


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Tokens drawn in a step and the seconds its phases took."""

    # sequence id -> token
    draws: dict[str, Draw]
    # sequence id -> log-probabilities of the prompt tokens that this step's prompt chunk predicts
    prompt_logprobs: dict[str, list[TokenLogprobs]]
    # the base model counts as one
    distinct_adapters: int
    # largest rank of each adapter in the batch
    lora_ranks: list[int]
    # operations of the forward pass, by the backend that ran them
    backend_calls: dict[str, int]
    forward_seconds: float
    sample_seconds: float


class Mark:
    """A moment on the device: everything launched before has run."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.Event | None = None
        self._seconds = time.perf_counter()
        if device.type == "cuda":
            self._event = torch.Event(device, enable_timing=True)
            self._event.record()

    def seconds_since(self, earlier: "Mark") -> float:
        """Both must be over."""
        if self._event is not None and earlier._event is not None:
            return 1e-3 * float(earlier._event.elapsed_time(self._event))
        return self._seconds - earlier._seconds


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be read from a step's logits, known when it is launched. Logits come chunk after chunk: the tokens
    that predict prompt tokens, then the one that draws."""

    # [num_draws] rows of the logits, and whose they are, by sequence id
    drawn_rows: npt.NDArray[np.int64]
    drawing: list[str]
    # prompt tokens described: rows that predict them, the tokens, and how many are whose
    prompt_rows: list[int]
    prompt_token_ids: list[int]
    prompts: list[tuple[str, int]]
    # draws described, by place among the draws
    described_draws: list[int]
    # alternatives to each described token, prompts first
    top_counts: list[int]

    @classmethod
    def of(cls, chunks: list[Chunk]) -> "Wanted":
        drawn, drawing, prompts, described = list[int](), list[str](), list[tuple[str, int]](), list[int]()
        prompt_rows, prompt_token_ids, prompt_counts, counts = list[int](), list[int](), list[int](), list[int]()
        row = 0
        for chunk in chunks:
            sequence = chunk.sequence
            if count := len(chunk.described):
                prompts.append((sequence.sequence_id, count))
                prompt_rows += range(row, row + count)
                prompt_token_ids += sequence.prompt_token_ids[chunk.described.start : chunk.described.stop]
                prompt_counts += [sequence.sampling.prompt_logprobs or 0] * count
                row += count
            if chunk.samples:
                if sequence.sampling.logprobs is not None:
                    described.append(len(drawn))
                    counts.append(sequence.sampling.logprobs)
                drawn.append(row)
                drawing.append(sequence.sequence_id)
                row += 1
        rows = np.array(drawn, np.int64)
        return cls(rows, drawing, prompt_rows, prompt_token_ids, prompts, described, prompt_counts + counts)


@dataclass(frozen=True, slots=True)
class StepTensors:
    """A launched step's output, on its way to the host."""

    wanted: Wanted
    # token ids and finiteness of the draws, when there are any; then what is described, when anything is
    download: Download
    # before the forward pass, behind it, behind the draws
    marks: tuple[Mark, Mark, Mark]
    backend_calls: dict[str, int]

    def read(self, distinct_adapters: int, lora_ranks: list[int]) -> StepOutput:
        """Waits until the step has run."""
        copies, wanted = self.download.wait(), self.wanted
        described: Iterator[TokenLogprobs] = iter(())
        if wanted.top_counts:
            described = iter(Described(*copies[-4:]).read(wanted.top_counts))
        prompts = {sequence_id: [next(described) for _ in range(count)] for sequence_id, count in self.wanted.prompts}
        of_draw = dict(zip(wanted.described_draws, described, strict=True))
        draws = {}
        if wanted.drawing:
            token_ids, finite = copies[0].tolist(), copies[1].tolist()
            for place, sequence_id in enumerate(wanted.drawing):
                draws[sequence_id] = Draw(token_ids[place], of_draw.get(place), finite[place])
        start, forwarded, drawn = self.marks
        return StepOutput(
            draws,
            prompts,
            distinct_adapters=distinct_adapters,
            lora_ranks=lora_ranks,
            backend_calls=self.backend_calls,
            forward_seconds=forwarded.seconds_since(start),
            sample_seconds=drawn.seconds_since(forwarded),
        )
