"""Each policy on traces made by hand, with the order it must give written out; and fairness over long runs."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable

import pytest

from scheduler.core.commands import Offer
from scheduler.core.costs import CostModel, StepFacts
from scheduler.core.model import Ending, Progress, Report, Request
from scheduler.core.policies.arrival import EarlyAbort
from scheduler.core.scheduler import Scheduler
from tests.scheduler.core_fakes import SimulatedWorker, make_hello, make_request, make_scheduler


def order(scheduler: Scheduler, *requests: Request, one_at_a_time: bool = True) -> list[str]:
    """Ids in the order in which a worker gets them; with one sequence at once each ends before the next decision."""
    for request in requests:
        scheduler.submit(request, 0.0)
    scheduler.register(make_hello(num_pages=10_000, max_sequences=1 if one_at_a_time else 64), 0.0)
    taken: list[str] = []
    while offers := _offers(scheduler, 0.0):
        taken += [offer.request.key.request_id for offer in offers]
        ends = [
            Progress(offer.request.key, Ending.FINISHED, generated_tokens=offer.request.max_tokens) for offer in offers
        ]
        scheduler.report("w0", Report(progress=tuple(ends)), 0.0)
    return taken


def _offers(scheduler: Scheduler, now: float) -> list[Offer]:
    commands = scheduler.schedule(now).commands.get("w0", [])
    return [command.action for command in commands if isinstance(command.action, Offer)]


def request(name: str, tenant: str = "t", adapter: str = "", **fields: int) -> Request:
    made = make_request(name, adapter, **fields)
    made.key = made.key._replace(tenant=tenant)
    return made


def test_fcfs_takes_the_oldest_of_the_highest_priority() -> None:
    requests = [request("a"), request("b", "u", "x"), request("c", priority=1), request("d", adapter="x")]
    assert order(make_scheduler(policy="fcfs"), *requests) == ["c", "a", "b", "d"]


def test_fcfs_stops_at_a_head_that_does_not_fit() -> None:
    scheduler = make_scheduler(policy="fcfs")
    scheduler.register(make_hello(num_pages=4), 0.0)
    for made in (
        request("a", prompt=8, max_tokens=4),
        request("large", prompt=8, max_tokens=8),
        request("small", prompt=1, max_tokens=1),
    ):
        scheduler.submit(made, 0.0)
    assert [offer.request.key.request_id for offer in _offers(scheduler, 0.0)] == ["a"]


def test_lcfs_takes_the_newest() -> None:
    requests = [request(name) for name in "abcd"]
    assert order(make_scheduler(policy="lcfs"), *requests) == ["d", "c", "b", "a"]


def test_cluster_prefers_adapters_that_run_once_there_are_d_of_them() -> None:
    """d = 1: "x" runs, so its requests go before those of "y" though they are younger; then first come first served."""
    requests = [request(f"{adapter}{index}", adapter=adapter) for index, adapter in enumerate("xyxyx")]
    scheduler = make_scheduler(policy="cluster", max_batch_adapters=1)
    assert order(scheduler, *requests, one_at_a_time=False) == ["x0", "x2", "x4", "y1", "y3"]


def test_cluster_with_a_large_d_is_first_come_first_served() -> None:
    requests = [request(f"{adapter}{index}", adapter=adapter) for index, adapter in enumerate("xyxyx")]
    scheduler = make_scheduler(policy="cluster", max_batch_adapters=8)
    assert order(scheduler, *requests, one_at_a_time=False) == ["x0", "y1", "x2", "y3", "x4"]


def test_cluster_lets_a_head_wait_no_longer_than_the_bound() -> None:
    scheduler = make_scheduler(policy="cluster", max_batch_adapters=1, cluster_wait_seconds=0.5)
    scheduler.register(make_hello(num_pages=10_000), 0.0)
    scheduler.submit(request("x0", adapter="x"), 0.0)
    assert [offer.request.key.request_id for offer in _offers(scheduler, 0.0)] == ["x0"]
    for made in (request("y1", adapter="y"), request("x2", adapter="x")):
        scheduler.submit(made, 0.0)
    assert [offer.request.key.request_id for offer in _offers(scheduler, 0.5)] == ["y1", "x2"]


def test_vtc_takes_the_tenant_with_the_fewest_tokens() -> None:
    """Prompts cost 1 a token and are charged at once, outputs 2 a token.

    Counters of (t, u) after each: a 8 + 16 = 24 to t; d 4 + 4 = 8 to u; e 16; f 24; then b, since t was first... ties
    go to the smaller name: b 48 to t; c.
    """
    requests = [request(name, "t", prompt=8, max_tokens=8) for name in "abc"]
    requests += [request(name, "u", prompt=4, max_tokens=2) for name in "def"]
    assert order(make_scheduler(policy="vtc"), *requests) == ["a", "d", "e", "f", "b", "c"]


def test_vtc_counts_base_model_requests_and_priorities_within_a_tenant() -> None:
    requests = [request("a", "t"), request("b", "t", "x", priority=1), request("c", "u"), request("d", "u", "x")]
    assert order(make_scheduler(policy="vtc"), *requests) == ["b", "c", "a", "d"]


def test_fair_takes_the_earliest_virtual_deadline() -> None:
    """Costs: 0.0001 s a prompt token and 0.0005 s an output token, so 0.0048 s for t's and 0.0014 s for u's.

    Deadlines (t, u): 4.8, 1.4 -> d; 4.8, 2.8 -> e; 4.8, 4.2 -> f; then t alone.
    """
    requests = [request(name, "t", prompt=8, max_tokens=8) for name in "abc"]
    requests += [request(name, "u", prompt=4, max_tokens=2) for name in "def"]
    assert order(make_scheduler(policy="fair"), *requests) == ["d", "e", "f", "a", "b", "c"]


def test_fair_shares_a_tenants_service_among_its_adapters() -> None:
    """Equal costs c. Adapter deadlines: x and y alternate, whatever came first; weights 1:3 between tenants."""
    requests = [request(f"x{index}", "t", "x") for index in range(3)] + [
        request("y0", "t", "y"),
        request("y1", "t", "y"),
    ]
    scheduler = make_scheduler(policy="fair", max_batch_adapters=8)
    assert order(scheduler, *requests) == ["x0", "y0", "x1", "y1", "x2"]


def test_fair_takes_short_requests_of_an_adapter_first_but_not_for_ever() -> None:
    """In one lane a request's deadline is its tenant's clock at its arrival plus its cost."""
    scheduler = make_scheduler(policy="fair")
    scheduler.register(make_hello(num_pages=10_000, max_sequences=1), 0.0)
    scheduler.submit(request("long", max_tokens=32), 0.0)
    taken = []
    for index in itertools.count():
        scheduler.submit(request(f"short{index}", max_tokens=8), 0.0)
        (offer,) = _offers(scheduler, 0.0)
        taken.append(offer.request.key.request_id)
        end = Progress(offer.request.key, Ending.FINISHED, generated_tokens=offer.request.max_tokens)
        scheduler.report("w0", Report(progress=(end,)), 0.0)
        if taken[-1] == "long":
            break
    # Deadlines: 16.8 ms, and 4.8, 9.6, 14.4, 19.2 ms for the short ones, each with those before it on the clock.
    assert taken == ["short0", "short1", "short2", "long"]


def test_early_abort_turns_to_the_newest_when_more_arrives_than_is_admitted() -> None:
    policy = EarlyAbort()
    assert not policy.newest_first
    policy.round_begins(10)
    policy.round_ends(2, 8)
    # R1 = int(0.7 x 10 + 0.3) = 7, R2 = max(int(0.7 x 2 + 0.3), 1) = 1.
    assert (policy.arriving, policy.admitted, policy.newest_first) == (7, 1, True)
    for _ in range(4):
        policy.round_begins(8)
        policy.round_ends(0, 8)
    assert (policy.arriving, policy.newest_first) == (0, False)


def test_early_abort_takes_the_newest_while_more_arrives_than_is_admitted() -> None:
    """Round 1: R1 = int(0.7 x 4 + 0.3) = 3 > R2 = 1. Round 2: R1 = int(0.3 x 3) = 0, R2 = 1: the oldest again."""
    scheduler = make_scheduler(policy="abort", ttft_slo_seconds=6.0)
    assert order(scheduler, *(request(name) for name in "abcd")) == ["d", "a", "b", "c"]


@pytest.mark.parametrize(("grace", "expected"), [(1.0, ["q1", "q2", "a2", "a3"]), (0.0, ["q1", "a2", "q2", "a3"])])
def test_fair_lets_a_tenant_go_on_where_it_was_between_two_turns(grace: float, expected: list[str]) -> None:
    """Costs: 4.8 ms for each of a's and 2.4 ms for each of q's; q's first turn ends when a has had 4.8 ms.

    Deadlines: with its place kept, q is at 2.4 ms: q1 4.8, q2 7.2, a2 9.6. Lifted to 4.8: q1 7.2, a2 9.6, q2 9.6.
    """
    scheduler = make_scheduler(session_grace_seconds=grace)
    scheduler.register(make_hello(num_pages=10_000, max_sequences=1), 0.0)
    taken = []
    for names in (["q0"], ["a1", "a2", "a3"], ["q1", "q2"]):
        for name in names:
            tokens = 4 if name[0] == "q" else 8
            scheduler.submit(request(name, name[0], prompt=tokens, max_tokens=tokens), 0.0)
        taken.append(_finish_next(scheduler, 0.0))
    assert taken[:2] == ["q0", "a1"]
    assert [*taken[2:], *(_finish_next(scheduler, 0.0) for _ in range(3))] == expected


def _finish_next(scheduler: Scheduler, now: float) -> str:
    (offer,) = _offers(scheduler, now)
    end = Progress(offer.request.key, Ending.FINISHED, generated_tokens=offer.request.max_tokens)
    scheduler.report("w0", Report(progress=(end,)), now)
    return offer.request.key.request_id


# Fairness over long runs: statement 19 of what a fair scheduler must show.


class Loop:
    """One worker and tenants that keep it busy; counts the service of each: prompt tokens plus twice the output."""

    def __init__(self, policy: str, **settings: object) -> None:
        self.scheduler = make_scheduler(policy=policy, max_waiting_requests=2, **settings)
        self.worker = SimulatedWorker("w0", num_pages=400)
        self.worker.epoch = self.scheduler.register(self.worker.hello(), 0.0)
        self.service: Counter[str] = Counter()
        self._names = itertools.count()
        self._running: dict[str, Request] = {}

    def submit(self, tenant: str, adapter: str = "", prompt: int = 8, max_tokens: int = 8) -> None:
        made = request(f"r{next(self._names)}", tenant, adapter, prompt=prompt, max_tokens=max_tokens)
        self.scheduler.submit(made, 0.0)

    def step(self) -> None:
        for command in self.scheduler.schedule(0.0).commands.get("w0", []):
            self.worker.inbox.append((self.worker.epoch, command))
            if isinstance(command.action, Offer):
                self.service[command.action.request.tenant] += command.action.request.prompt_tokens
        before = {key: sequence.generated for key, sequence in self.worker.sequences.items()}
        finished = set(self.worker.step())
        for key, generated in before.items():
            now = self.worker.sequences[key].generated if key not in finished else generated + 1
            self.service[key.tenant] += 2 * (now - generated)
        self.scheduler.report("w0", self.worker.report(), 0.0)

    def queued(self, tenant: str) -> int:
        return sum(queued.tenant == tenant for queued in self.scheduler.queue)


def gaps(policy: str, steps: int) -> list[int]:
    """Differences of service between two tenants that send at rates 1:2, both more than they can have."""
    loop, found = Loop(policy), []
    for step in range(steps):
        loop.submit("slow", prompt=8, max_tokens=8)
        for _ in range(2):
            loop.submit("fast", prompt=8, max_tokens=8)
        loop.step()
        if step % 50 == 49:
            found.append(abs(loop.service["fast"] - loop.service["slow"]))
    return found


@pytest.mark.parametrize("policy", ["vtc", "fair"])
def test_two_backlogged_tenants_at_rates_1_to_2_keep_a_bounded_difference(policy: str) -> None:
    """VTC's bound is 2 max(input, output price x tokens that a batch holds) = 2 x 2 x 8 x 16 here."""
    assert max(gaps(policy, 600)) <= 2 * 2 * 8 * 16


def test_the_difference_grows_without_bound_under_fcfs() -> None:
    """The negative control: what the two tests above would miss if service were not counted."""
    found = gaps("fcfs", 600)
    assert found[-1] > 4 * found[1] > 0
    assert found[-1] > 2 * 2 * 8 * 16


@pytest.mark.parametrize("policy", ["vtc", "fair"])
def test_a_tenant_that_was_idle_gets_no_credit_for_it(policy: str) -> None:
    loop = Loop(policy)
    for _ in range(400):
        loop.submit("steady")
        loop.step()
    loop.service.clear()
    for _ in range(200):
        for tenant in ("steady", "back"):
            loop.submit(tenant)
            loop.submit(tenant)
        loop.step()
    assert abs(loop.service["back"] - loop.service["steady"]) <= 2 * 2 * 8 * 16


@pytest.mark.parametrize("policy", ["vtc", "fair"])
def test_weights_1_2_3_4_give_service_in_that_ratio(policy: str) -> None:
    weights = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    loop = Loop(policy, tenant_weights=weights)
    for step in range(2000):
        for tenant in weights:
            while loop.queued(tenant) < 4:
                loop.submit(tenant, prompt=4, max_tokens=4)
        loop.step()
        if step == 100:
            loop.service.clear()
    share = {tenant: loop.service[tenant] / loop.service.total() for tenant in weights}
    assert share == {tenant: pytest.approx(weight / 10, rel=0.05) for tenant, weight in weights.items()}


@pytest.mark.parametrize("policy", ["vtc", "fair"])
@pytest.mark.parametrize(
    "adapters",
    [{"a": lambda n: "x", "b": lambda n: "x"}, {"a": lambda n: f"x{n % 100}", "b": lambda n: "y"}],
    ids=["two tenants on one adapter", "one tenant on 100 adapters"],
)
def test_tenants_share_equally_whatever_their_adapters(policy: str, adapters: dict[str, Callable[[int], str]]) -> None:
    # All of it together is some seconds of service; the default would let tenant b get ahead by a quarter of one.
    loop = Loop(policy, cluster_slack_seconds=0.01)
    for index in range(800):
        for tenant, adapter in adapters.items():
            while loop.queued(tenant) < 4:
                loop.submit(tenant, adapter(index), prompt=4, max_tokens=4)
        loop.step()
    assert loop.service["a"] == pytest.approx(loop.service["b"], rel=0.05)


def test_an_estimate_that_was_too_low_is_made_up_for() -> None:
    """Tenant `sly` answers longer than its adapter's answers were; the counter follows what it really had."""
    loop = Loop("fair")
    for _ in range(64):
        loop.scheduler.life.lengths.add("sly", 1)
    for _ in range(600):
        for tenant, adapter, tokens in (("sly", "sly", 32), ("plain", "plain", 32)):
            while loop.queued(tenant) < 4:
                loop.submit(tenant, adapter, prompt=4, max_tokens=tokens)
        loop.step()
    assert loop.service["sly"] == pytest.approx(loop.service["plain"], rel=0.1)


# The model of a step.


def steps(facts: Iterable[tuple[int, int, int]], seconds: Callable[[int, int, int], float]) -> CostModel:
    model = CostModel()
    for prefill, decode, adapters in facts:
        model.update(StepFacts(1, seconds(prefill, decode, adapters), prefill, decode, adapters))
    return model


def test_the_model_learns_what_a_step_takes() -> None:
    facts = [(index * 37 % 400, index % 32 + 1, index % 7) for index in range(400)]
    model = steps(facts, lambda p, d, a: 0.02 + 0.001 * p + 0.002 * d + 0.003 * a)
    assert model.coefficients == pytest.approx((0.02, 0.001, 0.002, 0.003), rel=0.02)
    assert model.prefill_tokens_within(0.3, 10, 2) == pytest.approx(254, abs=5)
    assert model.adapters_within(0.12, 20) == 2


def test_the_model_follows_a_worker_that_becomes_slower() -> None:
    facts = [(index * 37 % 400, index % 32 + 1, index % 7) for index in range(300)]
    model = steps(facts, lambda p, d, a: 0.01 + 0.0001 * p)
    for prefill, decode, adapters in facts * 5:
        model.update(StepFacts(1, 0.01 + 0.001 * prefill, prefill, decode, adapters))
    assert model.step_seconds(200, 16, 3) == pytest.approx(0.21, rel=0.05)


def test_steps_that_are_all_alike_do_not_upset_the_model() -> None:
    model = steps([(0, 8, 2)] * 20_000, lambda p, d, a: 0.03)
    assert model.step_seconds(0, 8, 2) == pytest.approx(0.03, rel=0.01)
    assert all(0 < coefficient < 1 for coefficient in model.coefficients)
