"""How many tokens a worker's steps may have, so that they take the time they should."""

from scheduler.core.settings import Settings
from scheduler.core.worker import Worker

# The budget is thought over once in so many updates of the model, and changed when it differs by more than this part.
_REPORTS_OF_A_BUDGET = 4
_LEAST_CHANGE = 0.25


def new_step_budget(worker: Worker, settings: Settings) -> int | None:
    """Tokens of a step at most from now on, when that changes; None otherwise.

    Sarathi-Serve's budget (OSDI 2024) in milliseconds instead of tokens: decodes and distinct adapters come first, and
    prompts get what time is left of `step_target_seconds`. While all clients wait for whole answers nobody notices how
    long a step takes, and steps have all the tokens that the worker can.
    """
    most, target = worker.capacity.max_step_tokens, settings.step_target_seconds
    if not target or not most or worker.costs.num_reports % _REPORTS_OF_A_BUDGET:
        return None
    told, tokens = most if worker.step_budget is None else worker.step_budget, most
    if worker.num_streaming:
        decodes, adapters = worker.num_running, len(worker.in_use.names)
        tokens = decodes + worker.costs.prefill_tokens_within(target, decodes, adapters)
        tokens = min(max(tokens, settings.min_step_tokens), most)
    if abs(tokens - told) <= _LEAST_CHANGE * told:
        return None
    worker.step_budget = tokens
    return tokens
