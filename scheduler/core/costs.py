"""How long a step of a worker takes: a linear model that follows what the worker reports."""

from dataclasses import dataclass

# What a worker is taken for before it has reported any step: seconds for a step, for a token of a prompt, for a
# generated token, for a distinct adapter. Any would do that is not far too small; reports replace it within a second.
_PRIOR = (0.005, 0.0001, 0.0005, 0.0002)
# Units in which the four features are of about the same size; keeps the estimate well conditioned.
_SCALES = (1.0, 64.0, 16.0, 4.0)
# A report counts half as much after about 350 later ones.
_FORGETTING = 0.998
# Variance of the prior over that of one report: a few reports outweigh it.
_UNCERTAINTY = 1e3
# It never grows above this, however long nothing new is seen (Landau's bounded gain).
_MAX_UNCERTAINTY = 1e4
# Reports that are looked at together; each of as many first ones is looked at alone.
REPORTS_OF_A_LOOK = 8
# A feature costs at least this part of the prior: noise must not make work free.
_LEAST = 0.01


@dataclass(frozen=True, slots=True)
class StepFacts:
    """Sums over the steps of one report."""

    steps: int
    seconds: float
    prefill_tokens: int = 0
    decode_tokens: int = 0
    # Distinct adapters, counted in each step.
    adapters: int = 0

    def plus(self, other: "StepFacts") -> "StepFacts":
        return StepFacts(
            self.steps + other.steps,
            self.seconds + other.seconds,
            self.prefill_tokens + other.prefill_tokens,
            self.decode_tokens + other.decode_tokens,
            self.adapters + other.adapters,
        )


class FactSum:
    """Sums up reports until they are worth a look: a model of steps need not follow every one, but the first ones."""

    def __init__(self) -> None:
        self._facts: StepFacts | None = None
        self._num_reports = 0
        self._num_sums = 0

    def add(self, facts: StepFacts) -> StepFacts | None:
        """The sum when it is worth a look, which then starts anew."""
        self._facts = facts if self._facts is None else self._facts.plus(facts)
        self._num_reports += 1
        if self._num_reports < REPORTS_OF_A_LOOK <= self._num_sums:
            return None
        total, self._facts, self._num_reports = self._facts, None, 0
        self._num_sums += 1
        return total


class CostModel:
    """seconds = a steps + b prefill tokens + c decode tokens + d distinct adapters, by recursive least squares."""

    def __init__(self) -> None:
        self.num_reports = 0
        self._weights = [prior * scale for prior, scale in zip(_PRIOR, _SCALES, strict=True)]
        self._bound()
        size = len(_PRIOR)
        self._covariance = [[_UNCERTAINTY * (i == j) for j in range(size)] for i in range(size)]

    def update(self, facts: StepFacts) -> None:
        """Takes in the steps of one report; none, or a time that is not positive, says nothing."""
        if facts.steps <= 0 or facts.seconds <= 0:
            return
        self.num_reports += 1
        counts = (facts.steps, facts.prefill_tokens, facts.decode_tokens, facts.adapters)
        # Per step: a report of many steps is one observation of their mean.
        x = [count / scale / facts.steps for count, scale in zip(counts, _SCALES, strict=True)]
        covariance, size = self._covariance, len(x)
        px = [sum(covariance[i][j] * x[j] for j in range(size)) for i in range(size)]
        denominator = _FORGETTING + sum(x[i] * px[i] for i in range(size))
        error = facts.seconds / facts.steps - sum(w * value for w, value in zip(self._weights, x, strict=True))
        for i in range(size):
            gain = px[i] / denominator
            self._weights[i] += gain * error
            for j in range(size):
                covariance[i][j] = (covariance[i][j] - gain * px[j]) / _FORGETTING
        self._bound()
        for i in range(size):
            if covariance[i][i] > _MAX_UNCERTAINTY:
                self._covariance = [[_MAX_UNCERTAINTY * (i == j) for j in range(size)] for i in range(size)]
                return

    def _bound(self) -> None:
        a, b, c, d = (
            max(weight / scale, _LEAST * prior)
            for weight, scale, prior in zip(self._weights, _SCALES, _PRIOR, strict=True)
        )
        # Seconds for a step, a prefill token, a decode token, a distinct adapter; all above 0.
        self.coefficients = a, b, c, d
        # Tokens that could be generated in the time that one distinct adapter adds to a step.
        self.adapter_tokens = d / c

    def service_seconds(self, prefill_tokens: int, decode_tokens: int) -> float:
        """Time that a request adds to the steps it is in."""
        _, prefill, decode, _ = self.coefficients
        return prefill * prefill_tokens + decode * decode_tokens

    def step_seconds(self, prefill_tokens: int, decode_tokens: int, adapters: int) -> float:
        a, b, c, d = self.coefficients
        return a + b * prefill_tokens + c * decode_tokens + d * adapters

    def prefill_tokens_within(self, seconds: float, decode_tokens: int, adapters: int) -> int:
        """Tokens of prompts that a step has time for beside `decode_tokens`; may be negative."""
        a, b, c, d = self.coefficients
        return int((seconds - a - c * decode_tokens - d * adapters) / b)

    def adapters_within(self, share: float, decode_tokens: int) -> int:
        """Distinct adapters whose bytes take at most `share` of a decode step; at least 1."""
        a, _, c, d = self.coefficients
        return max(1, int(share * (a + c * decode_tokens) / d))
