"""What one run of one system gave: every token and when it came."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

Tokens = tuple[tuple[int, ...], ...]
# Of a core: others that keep more busy disturb a run.
QUIET = 0.1


@dataclass(frozen=True, slots=True)
class Outcome:
    """`outputs` and `token_seconds` are in the order of the workload's requests; seconds count from the submission."""

    seconds: float
    outputs: Tokens
    # When each token of each request was there; empty where a system cannot say.
    token_seconds: tuple[tuple[float, ...], ...]
    peak_rss_bytes: int
    # CPU seconds that others took while it ran; filled in by who measures.
    neighbour_seconds: float = 0.0

    @classmethod
    def from_json(cls, line: str) -> "Outcome":
        fields: dict[str, Any] = json.loads(line)
        for name in ("outputs", "token_seconds"):
            fields[name] = tuple(map(tuple, fields[name]))
        return cls(**fields)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.outputs)) / self.seconds

    @property
    def neighbour_cores(self) -> float:
        """Cores that others kept busy, on the average."""
        return self.neighbour_seconds / self.seconds

    def ttft_seconds(self, percentile: float) -> float | None:
        """Submission to first token, over the requests."""
        firsts = [times[0] for times in self.token_seconds if times]
        return float(np.percentile(firsts, percentile)) if firsts else None

    def itl_seconds(self, percentile: float) -> float | None:
        """Between two tokens of one request, over all pairs; tokens that came together are 0 apart."""
        gaps = [gap for times in self.token_seconds for gap in np.diff(times).tolist()]
        return float(np.percentile(gaps, percentile)) if gaps else None


def differing(outputs: Tokens, reference: Tokens) -> list[int]:
    """Requests whose tokens are not the reference's."""
    if len(outputs) != len(reference):
        raise ValueError(f"{len(outputs)} answers to {len(reference)} requests")
    return [index for index, (ours, theirs) in enumerate(zip(outputs, reference, strict=True)) if ours != theirs]


def reset_peak_rss(pids: Iterable[int]) -> None:
    """From here on the peak counts anew (proc(5), clear_refs)."""
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_rss_bytes(pids: Sequence[int]) -> int:
    """Of all the processes together, each at its own peak."""
    return sum(_peak(pid) for pid in pids)


def _peak(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def with_children(pid: int) -> list[int]:
    """The process and all that its threads started, now."""
    children = [child for path in Path(f"/proc/{pid}/task").glob("*/children") for child in _words(path)]
    return [pid, *(grandchild for child in children for grandchild in with_children(int(child)))]


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        # The thread has ended.
        return []
