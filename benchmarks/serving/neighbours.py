"""What others took of the machine while a system ran.

A neighbour that keeps one of two cores busy halves a system of two threads that wait for each other, and costs one that
mostly runs on one thread little: then a ratio of the two says nothing.
"""

import os
from pathlib import Path

from benchmarks.serving.outcome import with_children

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
# Columns of a `cpu` line in proc(5) that are work: user, nice, system, irq, softirq.
WORK = (0, 1, 2, 5, 6)
# Of a process: utime, stime, and those of its children that have ended; counted behind the name.
OWN = (11, 12, 13, 14)


def work_seconds(line: str) -> float:
    """CPU seconds spent on anything, from the first line of /proc/stat."""
    ticks = line.split()[1:]
    return sum(int(ticks[column]) for column in WORK) / TICKS_PER_SECOND


class Neighbours:
    """CPU seconds of everybody but this process and its descendants, since it was made."""

    def __init__(self) -> None:
        self._before = self._seconds()

    def seconds(self) -> float:
        return max(0.0, self._seconds() - self._before)

    def _seconds(self) -> float:
        with open("/proc/stat") as file:
            everybody = work_seconds(file.readline())
        return everybody - sum(_seconds_of(pid) for pid in with_children(os.getpid()))


def _seconds_of(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        # It has ended; whoever waited for it has its seconds.
        return 0.0
    return sum(int(fields[column]) for column in OWN) / TICKS_PER_SECOND
