"""Workload W: what is asked, of which adapter, for how long. Numbers only, the same on every machine."""

from dataclasses import dataclass, replace

import numpy as np

NUM_REQUESTS = 64
# [low, high) of uniform draws
PROMPT_TOKENS, OUTPUT_TOKENS = (16, 129), (16, 65)
# Below are ids that tokenizers like to keep for themselves.
FIRST_TOKEN_ID = 3
BASE = -1
# Adapter BFLOAT16 + i is adapter i with its matrices rounded to bfloat16.
BFLOAT16 = 1000


@dataclass(frozen=True, slots=True)
class Request:
    """`adapter` is a number from 0, or BASE. The answer has exactly `output_tokens` tokens: end-of-sequence counts for
    nothing."""

    adapter: int
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that all arrive at once, answered greedily. `adapters` is how many there are to choose from, from 0 on;
    those in bfloat16 come on top."""

    name: str
    adapters: int
    requests: tuple[Request, ...]

    @property
    def distinct(self) -> int:
        """Adapters that are really asked for."""
        return len({request.adapter for request in self.requests} - {BASE})

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)

    @property
    def output_tokens(self) -> int:
        return sum(request.output_tokens for request in self.requests)

    def of_base(self) -> "Workload":
        """The same with every adapter left out."""
        requests = tuple(replace(request, adapter=BASE) for request in self.requests)
        return Workload(f"{self.name}-base", 0, requests)

    def first(self, num_requests: int, output_tokens: int) -> "Workload":
        """A short one, to warm a system up."""
        requests = tuple(
            replace(request, output_tokens=min(output_tokens, request.output_tokens))
            for request in self.requests[:num_requests]
        )
        return Workload(f"{self.name}-first", self.adapters, requests)


def power_law(adapters: int, vocab: int, num_requests: int = NUM_REQUESTS, seed: int = 0) -> Workload:
    """W itself: adapter k (from 0) is asked for with a probability that goes with 1 / (k + 1)."""
    rng = np.random.default_rng([seed, adapters, num_requests])
    weights = 1.0 / np.arange(1, adapters + 1)
    requests = []
    for _ in range(num_requests):
        adapter = int(rng.choice(adapters, p=weights / weights.sum()))
        prompt = rng.integers(FIRST_TOKEN_ID, vocab, int(rng.integers(*PROMPT_TOKENS)))
        requests.append(Request(adapter, tuple(prompt.tolist()), int(rng.integers(*OUTPUT_TOKENS))))
    return Workload(f"n{adapters}", adapters, tuple(requests))


def with_other_prompts(workload: Workload, vocab: int, variant: int) -> Workload:
    """The same adapters and lengths, other tokens: what a system kept of the prompts of `workload` does not help it.

    Variant 0 is the workload itself.
    """
    if variant == 0:
        return workload
    rng = np.random.default_rng([variant, workload.adapters, len(workload.requests)])
    requests = tuple(
        replace(request, prompt=tuple(rng.integers(FIRST_TOKEN_ID, vocab, len(request.prompt)).tolist()))
        for request in workload.requests
    )
    return replace(workload, requests=requests)


def each_its_own(vocab: int, num_requests: int = NUM_REQUESTS) -> Workload:
    """The requests of W over as many adapters, the n-th with the n-th adapter."""
    drawn = power_law(num_requests, vocab, num_requests).requests
    requests = tuple(replace(request, adapter=index) for index, request in enumerate(drawn))
    return Workload("distinct", num_requests, requests)


def all_on_one(vocab: int, adapter: int, num_requests: int = NUM_REQUESTS) -> Workload:
    """The requests of `each_its_own`, all with one adapter."""
    drawn = each_its_own(vocab, num_requests).requests
    return Workload("one", num_requests, tuple(replace(request, adapter=adapter) for request in drawn))


def in_bfloat16(vocab: int) -> Workload:
    """The requests of `each_its_own` with the same adapters, their files in bfloat16."""
    workload = each_its_own(vocab)
    requests = tuple(replace(request, adapter=BFLOAT16 + request.adapter) for request in workload.requests)
    return replace(workload, name="distinct-bf16", requests=requests)


def alone(vocab: int) -> Workload:
    """One request with a long answer: what a single stream sees."""
    request = power_law(8, vocab).requests[0]
    return Workload("solo", 8, (replace(request, output_tokens=OUTPUT_TOKENS[1] - 1),))


def named(name: str, vocab: int) -> Workload:
    """`n8` is W over 8 adapters; `distinct`, `distinct-bf16` and `one` share their prompts and lengths; `solo` is one
    request.

    Raises ValueError.
    """
    if name == "distinct":
        return each_its_own(vocab)
    if name == "distinct-bf16":
        return in_bfloat16(vocab)
    if name == "one":
        return all_on_one(vocab, adapter=2)
    if name == "solo":
        return alone(vocab)
    if name.startswith("n") and name[1:].isdecimal() and int(name[1:]) > 0:
        return power_law(int(name[1:]), vocab)
    known = "n1, n8, n64 (any number of adapters), distinct, distinct-bf16, one, solo"
    raise ValueError(f"{name!r} is no workload; known: {known}")
