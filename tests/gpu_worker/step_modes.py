"""Ways in which an engine's steps follow each other; whatever the way, a request's answer is the same."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpu_worker.model_runner import Queue, at_once
from gpu_worker.step_output import StepTensors


class LateDevice:
    """Runs a step as late as it may: when somebody asks for its result, or for that of a later one."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[[], StepTensors], list[StepTensors]]] = deque()

    def __call__(self, job: Callable[[], StepTensors], /) -> Callable[[], StepTensors]:
        result: list[StepTensors] = []
        self._waiting.append((job, result))

        def wait() -> StepTensors:
            while not result:
                first, into = self._waiting.popleft()
                into.append(first())
            return result[0]

        return wait


@dataclass(frozen=True, slots=True)
class StepMode:
    overlap: bool
    queue: Callable[[], Queue]

    def options(self) -> dict[str, Any]:
        """Of `engine_main.build`."""
        return {"overlap": self.overlap, "queue": self.queue()}


IN_TURN = StepMode(False, lambda: at_once)
# The next step has written all it writes when the one before is handled; or nothing yet.
EARLY = StepMode(True, lambda: at_once)
LATE = StepMode(True, LateDevice)
MODES = {"in-turn": IN_TURN, "early": EARLY, "late": LATE}
