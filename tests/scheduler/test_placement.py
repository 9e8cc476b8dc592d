"""Where requests go when there are several workers."""

import itertools
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scheduler.core.commands import Offer, Placed, Refused
from scheduler.core.model import Request, RequestState, Residency, Tier
from scheduler.core.placement import rendezvous
from scheduler.core.prefixes import PrefixMemory
from scheduler.core.scheduler import Scheduler
from tests.scheduler.core_fakes import SimulatedWorker, make_hello, make_request, make_scheduler, progress

ROOT = Path(__file__).resolve().parents[2]


def placed(scheduler: Scheduler) -> dict[str, str]:
    """Request id -> worker of what is placed now."""
    answers = list[Placed | Refused]()
    incomplete = True
    while incomplete:
        decisions = scheduler.schedule(0.0)
        answers += decisions.answers.get("g", [])
        incomplete = decisions.incomplete
    return {answer.key.request_id: answer.worker_id for answer in answers if isinstance(answer, Placed)}


def submit(scheduler: Scheduler, *requests: Request) -> None:
    for request in requests:
        scheduler.submit(request, 0.0)


def run(
    scheduler: Scheduler, workers: list[SimulatedWorker], requests: Iterable[Request], concurrency: int
) -> Counter[str]:
    """Keeps `concurrency` requests open until all have finished; returns tokens by worker."""
    waiting, open_requests, tokens = iter(requests), 0, Counter[str]()
    by_id = {worker.worker_id: worker for worker in workers}
    for worker in workers:
        scheduler.register(worker.hello(), 0.0)
    for _ in range(100_000):
        for request in itertools.islice(waiting, concurrency - open_requests):
            scheduler.submit(request, 0.0)
            open_requests += 1
        decisions = scheduler.schedule(0.0)
        for worker_id, commands in decisions.commands.items():
            core_worker = scheduler.fleet.get(worker_id)
            assert core_worker is not None
            by_id[worker_id].inbox += [(core_worker.epoch, command) for command in commands]
            offers = [command.action for command in commands if isinstance(command.action, Offer)]
            tokens[worker_id] += sum(offer.request.cost_tokens for offer in offers)
        if not open_requests:
            return tokens
        for worker in workers:
            open_requests -= len(worker.step())
            scheduler.report(worker.worker_id, worker.report(), 0.0)
    raise AssertionError(f"{open_requests} requests have not finished")


def zipf_adapters(generator: random.Random) -> Iterator[str]:
    weights = [1 / (rank + 1) for rank in range(8)]
    while True:
        yield generator.choices([f"a{index}" for index in range(8)], weights)[0]


@pytest.mark.parametrize("popularity", ["even", "zipf", "one"])
@pytest.mark.parametrize("concurrency", [16, 200], ids="concurrency{}".format)
def test_two_workers_share_200_requests_of_8_adapters(popularity: str, concurrency: int) -> None:
    generator = random.Random(1)
    adapters = {
        "even": (f"a{index % 8}" for index in itertools.count()),
        "zipf": zipf_adapters(generator),
        "one": itertools.repeat("a0"),
    }[popularity]
    requests = [
        make_request(
            f"r{index}", next(adapters), prompt=generator.randint(4, 20), max_tokens=generator.randint(64, 128)
        )
        for index in range(200)
    ]
    workers = [SimulatedWorker(name, num_pages=400) for name in ("w0", "w1")]
    tokens = run(make_scheduler(), workers, requests, concurrency)
    assert min(tokens.values()) >= 0.3 * sum(tokens.values())
    assert all(len(worker.loads) == len(set(worker.loads)) for worker in workers)


def test_adapters_that_come_one_by_one_are_shared_out_too() -> None:
    """Nothing is ever queued or running beside a request, and all adapters would rather go to the same worker."""
    names = (f"a{index}" for index in itertools.count())
    drawn = list(itertools.islice((name for name in names if rendezvous(name, "w0") > rendezvous(name, "w1")), 8))
    requests = [make_request(f"r{index}", drawn[index % 8], prompt=10, max_tokens=20) for index in range(80)]
    workers = [SimulatedWorker(name, num_pages=400) for name in ("w0", "w1")]
    tokens = run(make_scheduler(), workers, requests, 1)
    assert min(tokens[worker.worker_id] for worker in workers) >= 0.3 * tokens.total()
    assert all(len(worker.loads) == len(set(worker.loads)) for worker in workers)


def test_an_adapter_stays_on_at_most_two_of_four_workers() -> None:
    adapters = (f"a{index % 8}" for index in itertools.count())
    requests = [make_request(f"r{index}", next(adapters), prompt=10, max_tokens=40) for index in range(200)]
    workers = [SimulatedWorker(f"w{index}", num_pages=200) for index in range(4)]
    tokens = run(make_scheduler(), workers, requests, 64)
    loads = Counter(adapter for worker in workers for adapter in set(worker.loads))
    assert max(loads.values()) <= 2
    assert min(tokens[worker.worker_id] for worker in workers) >= 0.15 * tokens.total()


def test_a_worker_that_was_given_too_much_preempts_and_everything_finishes() -> None:
    requests = [make_request(f"r{index}", prompt=4, max_tokens=40) for index in range(20)]
    worker = SimulatedWorker("w0", num_pages=24)
    scheduler = make_scheduler(output_quantile=0.1)
    for _ in range(16):
        scheduler.life.lengths.add("", 8)
    run(scheduler, [worker], requests, 20)
    assert worker.preemptions > 0


def test_a_worker_that_was_given_what_fits_never_preempts() -> None:
    requests = [make_request(f"r{index}", prompt=4, max_tokens=40) for index in range(20)]
    worker = SimulatedWorker("w0", num_pages=24)
    run(make_scheduler(), [worker], requests, 20)
    assert worker.preemptions == 0


def test_an_adapter_goes_where_it_is_in_pages_or_in_host_memory() -> None:
    scheduler = make_scheduler()
    scheduler.register(make_hello("w0", resident=(Residency("b", Tier.HOST),)), 0.0)
    scheduler.register(make_hello("w1", resident=(Residency("a", Tier.PAGES, 2),)), 0.0)
    submit(
        scheduler, make_request("r0", "a"), make_request("r1", "a"), make_request("r2", "b"), make_request("r3", "b")
    )
    assert placed(scheduler) == {"r0": "w1", "r1": "w1", "r2": "w0", "r3": "w0"}


def test_an_adapter_in_use_attracts_its_next_request_before_it_is_resident() -> None:
    scheduler = make_scheduler()
    for worker_id in ("w0", "w1"):
        scheduler.register(make_hello(worker_id), 0.0)
    submit(scheduler, *(make_request(f"r{index}", adapter) for index, adapter in enumerate("abab")))
    assert placed(scheduler) == {"r0": "w1", "r1": "w0", "r2": "w1", "r3": "w0"}


def test_idle_workers_take_turns() -> None:
    scheduler = make_scheduler()
    workers = [SimulatedWorker("w0"), SimulatedWorker("w1")]
    tokens = run(scheduler, workers, [make_request(f"r{index}") for index in range(10)], 1)
    assert tokens == {"w0": 80, "w1": 80}


def test_a_request_spills_when_the_difference_is_clear() -> None:
    scheduler = make_scheduler(spill_ratio=1.0, spill_margin_tokens=30, rank_cost_share=0.0)
    for worker_id in ("w0", "w1"):
        scheduler.register(make_hello(worker_id), 0.0)
    submit(scheduler, *(make_request(f"r{index}", "a") for index in range(4)))
    # Loads of w1, the first choice for "a", before each choice: 0, 16, 32 (above 0 + 30: spill), then 32 to 16.
    assert placed(scheduler) == {"r0": "w1", "r1": "w1", "r2": "w0", "r3": "w1"}


def test_an_idle_worker_relieves_a_full_one() -> None:
    scheduler = make_scheduler()
    scheduler.register(make_hello("w0", num_pages=8), 0.0)
    submit(scheduler, make_request("r0", "a"))
    assert placed(scheduler) == {"r0": "w0"}
    scheduler.register(make_hello("w1", num_pages=8), 0.0)
    submit(scheduler, make_request("r1", "a"))
    assert placed(scheduler) == {"r1": "w1"}


def test_an_idle_worker_helps_though_nothing_happened_to_it() -> None:
    scheduler = make_scheduler()
    for worker_id in ("w0", "w1"):
        scheduler.register(make_hello(worker_id, num_pages=8), 0.0)
    submit(scheduler, make_request("r0", "a"))
    (home,) = placed(scheduler).values()
    submit(scheduler, make_request("r1", "a"))
    assert placed(scheduler) == {"r1": {"w0": "w1", "w1": "w0"}[home]}


def test_the_oldest_request_is_not_overtaken_on_the_worker_it_waits_for() -> None:
    scheduler = make_scheduler(policy="cluster", max_overtaking=0)
    scheduler.register(make_hello("w0", num_pages=8), 0.0)
    submit(scheduler, make_request("running", max_tokens=16))
    assert placed(scheduler) == {"running": "w0"}
    submit(scheduler, make_request("large", "a", max_tokens=16), make_request("small", prompt=1, max_tokens=1))
    assert placed(scheduler) == {}
    scheduler.register(make_hello("w1", num_pages=6), 0.0)
    assert placed(scheduler) == {"small": "w1"}


def test_a_draining_worker_gets_nothing() -> None:
    scheduler = make_scheduler()
    scheduler.register(make_hello("w0"), 0.0)
    worker = scheduler.fleet.get("w0")
    assert worker is not None
    worker.draining = True
    submit(scheduler, make_request("r"))
    assert placed(scheduler) == {}


def test_the_local_queue_of_a_worker_stays_short() -> None:
    scheduler = make_scheduler(max_waiting_requests=3)
    scheduler.register(make_hello("w0", num_pages=1000), 0.0)
    submit(scheduler, *(make_request(f"r{index}") for index in range(5)))
    assert list(placed(scheduler)) == ["r0", "r1", "r2"]


def test_sequences_are_limited_and_outputs_count() -> None:
    scheduler = make_scheduler(policy="fcfs")
    scheduler.register(make_hello("w0", num_pages=1000, max_sequences=4), 0.0)
    submit(scheduler, make_request("r0", num_outputs=3), make_request("r1", num_outputs=2), make_request("r2"))
    assert list(placed(scheduler)) == ["r0"]


def chain(*numbers: int) -> dict[str, Any]:
    return {"prefix": numbers, "prefix_chunk_tokens": 16}


def test_a_request_follows_its_prefix_among_workers_of_equal_load() -> None:
    scheduler = make_scheduler()
    for worker_id in ("w0", "w1"):
        scheduler.register(make_hello(worker_id, num_pages=1000), 0.0)
    submit(scheduler, make_request("first", prompt=48, **chain(1, 2, 3)), make_request("other", prompt=48, **chain(9)))
    assert placed(scheduler) == {"first": "w0", "other": "w1"}
    submit(scheduler, make_request("again", prompt=48, **chain(1, 2, 4)), make_request("new", prompt=48, **chain(7)))
    assert placed(scheduler) == {"again": "w0", "new": "w1"}


def test_a_prefix_counts_as_work_that_is_saved_and_no_more() -> None:
    """w0 has 32 tokens of the prompt and 100 more tokens of work than w1."""
    scheduler = make_scheduler()
    for worker_id in ("w0", "w1"):
        scheduler.register(make_hello(worker_id, num_pages=1000), 0.0)
    submit(scheduler, make_request("first", prompt=100, **chain(1, 2)))
    assert placed(scheduler) == {"first": "w0"}
    submit(scheduler, make_request("again", prompt=48, **chain(1, 2)))
    assert placed(scheduler) == {"again": "w1"}


def test_prefixes_are_forgotten_the_longest_first() -> None:
    memory = PrefixMemory(3)
    memory.add((1, 2, 3))
    memory.add((4,))
    assert [memory.num_known(prefix) for prefix in ((1, 2, 3), (4,), (2,), ())] == [2, 1, 1, 0]


def test_cold_adapters_find_the_same_workers_whatever_came_before() -> None:
    """Rendezvous hashing: two schedulers that see the adapters in another order agree on nearly all of them."""
    names = [f"a{index}" for index in range(40)]
    places = []
    for order in (names, names[::-1]):
        scheduler = make_scheduler(max_waiting_requests=100)
        for index in range(4):
            scheduler.register(make_hello(f"w{index}", num_pages=1000, max_sequences=100), 0.0)
        submit(scheduler, *(make_request(name, name) for name in order))
        places.append(placed(scheduler))
    assert sum(places[0][name] == places[1][name] for name in names) >= 24
    assert max(Counter(places[0].values()).values()) <= 13


def test_few_adapters_move_when_a_worker_comes() -> None:
    names = [f"a{index}" for index in range(200)]
    workers = [f"w{index}" for index in range(5)]
    before = {name: max(workers[:4], key=lambda worker: rendezvous(name, worker)) for name in names}
    after = {name: max(workers, key=lambda worker: rendezvous(name, worker)) for name in names}
    moved = [name for name in names if before[name] != after[name]]
    assert {after[name] for name in moved} == {"w4"}
    assert 20 <= len(moved) <= 60


def test_a_hot_adapter_has_as_many_homes_as_its_load_needs() -> None:
    """One of eight requests is of another adapter; the hot one spreads over all workers, the others hardly."""
    adapters = ("hot" if index % 8 else f"a{index // 8 % 4}" for index in itertools.count())
    requests = [make_request(f"r{index}", next(adapters), prompt=10, max_tokens=40) for index in range(400)]
    workers = [SimulatedWorker(f"w{index}", num_pages=200) for index in range(4)]
    run(make_scheduler(), workers, requests, 96)
    loads = Counter(adapter for worker in workers for adapter in set(worker.loads))
    assert loads["hot"] == 4
    assert max(loads[f"a{index}"] for index in range(4)) <= 2


@pytest.mark.parametrize(("share", "large_goes_to"), [(1.0, "w1"), (0.0, "w0")])
def test_a_large_adapter_goes_where_it_slows_few_down(share: float, large_goes_to: str) -> None:
    """w0 runs four short requests of x, w1 a long one of y with 10 tokens more; x and y have 2 pages.

    An adapter of 2 pages costs 0.4 tokens a step for each that runs there, and one for the newcomer. For 8 steps of 1
    page: w0 48 + 0.2 x 8 x 5 = 56, w1 58 + 0.2 x 8 x 2 = 61. Of 10 pages: w0 48 + 80, w1 58 + 32.
    """
    for pages, expected in ((1, "w0"), (10, large_goes_to)):
        scheduler = make_scheduler(spill_ratio=1.0, spill_margin_tokens=0, rank_cost_share=share)
        scheduler.register(make_hello("w0", num_pages=1000), 0.0)
        submit(scheduler, *(make_request(f"x{index}", "x", prompt=2, max_tokens=10) for index in range(4)))
        assert set(placed(scheduler).values()) == {"w0"}
        scheduler.register(make_hello("w1", num_pages=1000), 0.0)
        submit(scheduler, make_request("y", "y", prompt=8, max_tokens=50))
        assert placed(scheduler) == {"y": "w1"}
        for worker_id, names in (("w0", ("x0", "x1", "x2", "x3")), ("w1", ("y",))):
            for name in names:
                scheduler.report(worker_id, progress(name, RequestState.RUNNING), 0.0)
        submit(scheduler, make_request("new", "new", adapter_bytes=50 * pages))
        assert placed(scheduler) == {"new": expected}


def test_an_adapter_gets_one_more_home_in_a_while_and_no_more() -> None:
    """w1 is first for the adapter; each request has 16 tokens, and every other worker has far less than that."""
    for replica_seconds, expected in ((1.0, ["w1", "w0", "w1", "w0", "w2"]), (0.0, ["w1", "w0", "w2", "w1", "w0"])):
        scheduler = make_scheduler(
            spill_ratio=1.0, spill_margin_tokens=0, rank_cost_share=0.0, replica_seconds=replica_seconds
        )
        for worker_id in ("w0", "w1", "w2"):
            scheduler.register(make_hello(worker_id, num_pages=1000), 0.0)
        workers = []
        for index, now in enumerate((0.0, 0.1, 0.2, 0.3, 1.1)):
            scheduler.submit(make_request(f"r{index}", "a"), now)
            ((_, commands),) = scheduler.schedule(now).commands.items()
            workers += [scheduler.requests.attempts(f"r{index}")[0].worker_id]
            assert commands
        assert workers == expected


def test_a_busy_worker_takes_over_an_adapter_no_sooner_than_it_may_have_another_home() -> None:
    scheduler = make_scheduler(policy="fcfs", spill_ratio=1.0, spill_margin_tokens=0, rank_cost_share=0.0)
    for worker_id in ("w1", "w2"):
        scheduler.register(make_hello(worker_id), 0.0)
    submit(scheduler, make_request("x1"), make_request("x2"))
    assert sorted(placed(scheduler).values()) == ["w1", "w2"]
    scheduler.register(make_hello("w0", max_sequences=1), 0.0)
    submit(scheduler, *(make_request(f"a{index}", "a", max_tokens=64) for index in range(2)))
    homes = set(placed(scheduler).values())
    assert len(homes) == 2
    (third,) = {"w1", "w2"} - homes
    scheduler.submit(make_request("a2", "a", max_tokens=64), 0.5)
    for now, num_homes in ((0.5, 2), (1.0, 3)):
        scheduler.life.touch(third)
        scheduler.schedule(now)
        assert len(scheduler.fleet.homes.of("a")) == num_homes


def test_homes_are_forgotten_with_the_registration_that_had_them() -> None:
    scheduler = make_scheduler()
    scheduler.register(make_hello("w0", resident=(Residency("a", Tier.HOST), Residency("b", Tier.PAGES, 2))), 0.0)
    submit(scheduler, make_request("r", "a"))
    scheduler.schedule(0.0)
    scheduler.register(make_hello("w0", resident=(Residency("c", Tier.HOST),)), 0.0)
    assert [len(scheduler.fleet.homes.of(adapter)) for adapter in "abc"] == [1, 0, 1]
    scheduler.worker_lost("w0", 0.0)
    assert [len(scheduler.fleet.homes.of(adapter)) for adapter in "abc"] == [0, 0, 0]


def test_what_waits_for_a_lost_worker_waits_for_another() -> None:
    scheduler = make_scheduler()
    for worker_id in ("w0", "w1"):
        scheduler.register(make_hello(worker_id, max_sequences=1), 0.0)
    submit(scheduler, *(make_request(f"r{index}") for index in range(4)))
    assert placed(scheduler) == {"r0": "w0", "r1": "w1"}
    scheduler.worker_lost("w0", 0.0)
    assert {request.line_id for request in scheduler.queue} == {"w1"}


DECISIONS = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.scheduler.core_fakes import SimulatedWorker, make_request, make_scheduler
from tests.scheduler.test_placement import run
for policy in ("fair", "vtc", "cluster", "fcfs", "lcfs", "abort"):
    workers = [SimulatedWorker(f"w{i}", num_pages=40) for i in range(3)]
    requests = [
        make_request(f"{policy}{i}", "abcdefg"[i * i % 7], prompt=i % 9 + 1, max_tokens=i % 31 + 1) for i in range(100)
    ]
    for i, request in enumerate(requests):
        request.key = request.key._replace(tenant=f"t{i % 5}")
    tokens = run(make_scheduler(policy=policy), workers, requests, 40)
    print(policy, sorted(tokens.items()), [w.loads for w in workers], [r.order_key for r in requests])
"""


def test_decisions_do_not_depend_on_the_hash_seed() -> None:
    command = [sys.executable, "-c", DECISIONS, str(ROOT)]
    results = {
        subprocess.run(command, check=True, capture_output=True, text=True, env={"PYTHONHASHSEED": seed}).stdout
        for seed in ("0", "1", "2", "3", "4")
    }
    assert len(results) == 1
