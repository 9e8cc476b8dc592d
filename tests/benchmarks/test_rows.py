"""What a row holds, and how it follows from the runs."""

import json
import os

from benchmarks.serving.catalogue import ENTRIES
from benchmarks.serving.outcome import Outcome, peak_rss_bytes, reset_peak_rss, with_children
from benchmarks.serving.rows import row
from benchmarks.serving.workload import power_law

WANTED = {
    "model",
    "adapters",
    "distinct",
    "system",
    "mode",
    "tokens_per_second",
    "ttft_p50_seconds",
    "ttft_p99_seconds",
    "itl_p50_seconds",
    "peak_rss_bytes",
    "token_equal",
}
TIMES = ((0.5, 0.6, 0.8), (0.7, 0.8, 0.9, 1.0))


def outcome(seconds: float, peak: int = 5) -> Outcome:
    return Outcome(seconds, ((1, 2, 3), (4, 5, 6, 7)), TIMES, peak)


def test_a_row_has_every_field_and_is_one_json_line() -> None:
    found = row("S", power_law(64, 2048), "engine", ENTRIES["engine"], [outcome(1.0)], 0)
    assert found.keys() >= WANTED
    assert "\n" not in json.dumps(found)
    assert (found["adapters"], found["distinct"], found["system"]) == (64, 25, "loraplex")


def test_speed_is_the_median_of_the_runs_with_quartiles_beside_it() -> None:
    runs = [outcome(seconds, peak) for seconds, peak in ((7.0, 3), (3.5, 9), (1.0, 4), (1.75, 4), (7.0, 4))]
    found = row("S", power_law(8, 2048), "engine", ENTRIES["engine"], runs, 0)
    assert (found["tokens_per_second"], found["tokens_per_second_quartiles"], found["runs"]) == (2.0, [1.0, 4.0], 5)
    assert found["peak_rss_bytes"] == 9


def test_latencies_are_those_of_the_tokens() -> None:
    found = row("S", power_law(8, 2048), "engine", ENTRIES["engine"], [outcome(1.0)], 0)
    assert (found["ttft_p50_seconds"], found["itl_p50_seconds"]) == (0.6, 0.1)
    assert found["ttft_p99_seconds"] == 0.698


def test_a_system_that_cannot_say_when_its_tokens_came_has_no_latencies() -> None:
    silent = Outcome(1.0, ((1,), (2,)), ((), ()), 5)
    found = row("S", power_law(8, 2048), "unary", ENTRIES["unary"], [silent], 0)
    assert (found["ttft_p50_seconds"], found["itl_p50_seconds"]) == (None, None)


def test_wrong_answers_are_in_the_row() -> None:
    found = row("S", power_law(8, 2048), "engine", ENTRIES["engine"], [outcome(1.0)], 12)
    assert (found["token_equal"], found["differing"]) == (False, 12)


def test_an_outcome_travels_as_json() -> None:
    assert Outcome.from_json(outcome(1.5).to_json()) == outcome(1.5)


def test_the_peak_of_a_process_counts_from_where_it_was_reset() -> None:
    pids = [os.getpid()]
    block = bytearray(os.urandom(1 << 20)) * 64
    high = peak_rss_bytes(pids)
    del block
    reset_peak_rss(pids)
    assert peak_rss_bytes(pids) < high - (32 << 20)
    assert os.getpid() in with_children(os.getpid())
