"""The demo: six adapters and their base model answer the same words side by side, from one batch.

Starts four real services, uploads the adapters of `demo_model/`, streams everything at once, checks every answer, asks
the worker how many adapters shared a forward batch, and stops everything. Run from the checkout: `make demo`.
"""

import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, Python looks only in this folder

from examples.demo_model.words import SKILLS, copy, prompt_for
from loraplex import AsyncClient, LoraplexError
from loraplex.fleet import Fleet, FleetOptions
from loraplex.metrics import DISTINCT_ADAPTERS, fetch_metrics, histogram_maximum, kernel_calls
from loraplex.process import FleetError, sigterm_as_interrupt

MODEL_NAME = "loraplex-demo"
MODEL_FOLDER = Path(__file__).resolve().parent / "demo_model"
# Held-out words that every adapter answers with a margin of more than 7 between its best and second-best logit.
WORDS = (
    *("nvdjqif", "mqrocea", "xgnfziw", "kvycwet", "fcmigwy", "wlaxbng"),
    *("nluacjs", "oiqlvdf", "gsahdxv", "mpjosu", "gykehv", "amvufq"),
)
TOKENS_PER_STREAM = 64
MAX_ANSWER_TOKENS = 32
REQUIRED_DISTINCT_ADAPTERS = 6
# On a busy machine the answers of a round may miss each other.
MAX_ROUNDS = 5
REDRAW_SECONDS = 0.05


@dataclass
class Stream:
    """One column: a model that answers word after word until it has produced its tokens."""

    name: str
    adapter_id: str
    skill: Callable[[str], str]
    answers: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    async def run(self, client: AsyncClient, on_change: Callable[[], None]) -> None:
        started = time.monotonic()
        for word in WORDS:
            if self.tokens >= TOKENS_PER_STREAM:
                break
            self.answers.append("")
            deltas = client.stream(
                prompt_for(word), self.adapter_id, temperature=0.0, max_tokens=MAX_ANSWER_TOKENS, timeout=200.0
            )
            async for delta in deltas:
                self.answers[-1] += delta.text
                self.tokens += delta.usage.completion_tokens if delta.usage else 0
                on_change()
        self.seconds = time.monotonic() - started

    def mistakes(self) -> list[str]:
        """A sentence for each wrong answer."""
        return [
            f"{self.name} answered {answer!r} to {word!r}, not {self.skill(word)!r}"
            for word, answer in zip(WORDS, self.answers, strict=False)
            if answer != self.skill(word)
        ]


class Board:
    """The answers as a table, words down and models across; redrawn in place on a terminal, else printed once."""

    def __init__(self, streams: Sequence[Stream], output: TextIO) -> None:
        self._streams = streams
        self._output = output
        self._widths = [max(len(stream.name), *(len(stream.skill(word)) for word in WORDS)) for stream in streams]
        self._word_width = max(map(len, WORDS))
        self._drawn_lines = 0
        self._drawn_at = 0.0

    def changed(self) -> None:
        if self._output.isatty() and time.monotonic() - self._drawn_at > REDRAW_SECONDS:
            self._draw()

    def finish(self) -> None:
        self._draw()

    def _draw(self) -> None:
        up = f"\x1b[{self._drawn_lines}A" if self._drawn_lines else ""
        clear = "\x1b[K" if self._output.isatty() else ""
        lines = self._lines()
        self._output.write(up + "".join(f"{line}{clear}\n" for line in lines))
        self._output.flush()
        self._drawn_lines, self._drawn_at = len(lines), time.monotonic()

    def _lines(self) -> list[str]:
        rows = [["", *(stream.name for stream in self._streams)]]
        started_rows = max(len(stream.answers) for stream in self._streams)
        for index, word in enumerate(WORDS[:started_rows]):
            answers = [stream.answers[index] if index < len(stream.answers) else "" for stream in self._streams]
            rows.append([word, *answers])
        widths = [self._word_width, *self._widths]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


async def upload_and_stream(gateway: str, streams: Sequence[Stream], on_change: Callable[[], None]) -> float:
    """Returns the seconds from the first prompt to the last answer.

    Raises LoraplexError when an adapter is missing or refused, or a group of them when streams fail.
    """
    async with AsyncClient(gateway) as client:
        for stream in streams:
            if stream.adapter_id:
                await client.adapters.push(stream.adapter_id, MODEL_FOLDER / "adapters" / stream.adapter_id)
        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for stream in streams:
                group.create_task(stream.run(client, on_change))
        return time.monotonic() - started


def summary(streams: Sequence[Stream], distinct: float, seconds: float) -> str:
    each = sum(stream.tokens / stream.seconds for stream in streams) / len(streams)
    in_all = sum(stream.tokens for stream in streams) / seconds
    shared = f"{distinct:g} distinct adapters shared a forward batch (the base counts as one)"
    return f"{shared}; {each:.1f} tokens/s per stream, {in_all:.1f} tokens/s in all"


def problems_of(streams: Sequence[Stream], distinct: float) -> list[str]:
    """A sentence for each wrong answer, and one for a batch that was not mixed."""
    problems = [mistake for stream in streams for mistake in stream.mistakes()]
    if distinct < REQUIRED_DISTINCT_ADAPTERS:
        problems.append(f"at most {distinct:g} adapters shared a batch, fewer than {REQUIRED_DISTINCT_ADAPTERS}")
    return problems


def run_demo(data_dir: Path) -> list[str]:
    """Prints the answers and the summary; returns what went wrong, in sentences."""
    print("starting adapter_store, scheduler, gpu_worker and gateway ...", flush=True)
    options = FleetOptions(model=MODEL_FOLDER / "base", model_name=MODEL_NAME, data_dir=data_dir)
    with Fleet(options) as fleet:
        for _ in range(MAX_ROUNDS):
            streams = [Stream(name, name, skill) for name, skill in SKILLS.items()]
            streams.append(Stream("base", "", copy))
            board = Board(streams, sys.stdout)
            seconds = asyncio.run(upload_and_stream(fleet.gateway.address, streams, board.changed))
            metrics = fetch_metrics(fleet.workers[0].metrics_address)
            distinct = histogram_maximum(metrics, DISTINCT_ADAPTERS)
            board.finish()
            if not (problems := problems_of(streams, distinct)) or any(stream.mistakes() for stream in streams):
                break
    print(summary(streams, distinct, seconds))
    if kernel_calls(metrics).get("reference"):
        print("the compiled kernels are not in use, so this ran on plain torch; `make install` with a C++ compiler")
    return problems


def main() -> int:
    data_dir = Path(tempfile.mkdtemp(prefix="loraplex-demo-"))
    try:
        with sigterm_as_interrupt():
            problems = run_demo(data_dir)
    except* (FleetError, LoraplexError, OSError) as failures:
        problems = [str(failure) for failure in failures.exceptions]
    except* KeyboardInterrupt:
        problems = ["stopped before the end"]
    for problem in problems:
        print(f"demo failed: {problem}", file=sys.stderr)
    if problems:
        print(f"the logs are in {data_dir / 'logs'}", file=sys.stderr)
        return 1
    shutil.rmtree(data_dir)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
