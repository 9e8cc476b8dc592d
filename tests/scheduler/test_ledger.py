"""The counters of clients: who is lifted how far when it comes back, and what is forgotten."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.core.clock import Clock
from scheduler.core.ledger import Ledger


def test_a_client_that_returns_while_others_only_run_is_lifted_to_them() -> None:
    """The branch that S-LoRA's code lacks."""
    ledger = Ledger({})
    ledger.join("runs")
    ledger.charge("runs", 10.0)
    ledger.join("back")
    assert ledger.counter("back") == 10.0


def test_when_nobody_is_there_a_client_is_lifted_to_the_one_that_left_last() -> None:
    ledger = Ledger({})
    for client, service in (("first", 3.0), ("last", 7.0)):
        ledger.join(client)
        ledger.charge(client, service)
    ledger.leave("first")
    ledger.leave("last")
    ledger.join("first")
    assert ledger.counter("first") == 10.0


def test_credit_is_used_up_before_the_counter_grows_and_is_not_kept_by_the_idle() -> None:
    ledger = Ledger({"a": 2.0})
    ledger.join("a")
    ledger.charge("a", 8.0)
    ledger.charge("a", -2.0)
    ledger.charge("a", 3.0)
    assert ledger.counter("a") == 4.5
    ledger.charge("a", -2.0)
    ledger.leave("a")
    ledger.join("a")
    ledger.charge("a", 2.0)
    assert ledger.counter("a") == 5.5


def test_idle_clients_are_forgotten() -> None:
    ledger = Ledger({})
    for index in range(10_000):
        client = f"c{index}"
        ledger.join(client)
        ledger.charge(client, 1.0)
        ledger.leave(client)
    assert sum(ledger.counter(f"c{index}") > 0 for index in range(10_000)) < 2_000


def graced(ago: float, turns: int = 1) -> float:
    """Service that a client may have before it is where the others are: they had 10 s since it left, `ago` seconds ago.

    Before, it had `turns` short absences in which the others had 10 s each.
    """
    clock = Clock(0.0)
    ledger = Ledger({}, clock, grace_seconds=2.0)
    ledger.join("others")
    ledger.queue("others")
    for turn in range(turns):
        ledger.join("session")
        ledger.charge("session", 1.0)
        ledger.leave("session")
        ledger.charge("others", 10.0)
        clock.now += ago if turn == turns - 1 else 1.0
    ledger.join("session")
    return ledger.counter("others") - ledger.counter("session")


def test_a_client_keeps_its_place_between_the_turns_of_a_session_and_is_lifted_later() -> None:
    assert graced(ago=1.9) == 2.0
    assert graced(ago=2.0) == 0.0


def test_many_turns_gather_no_more_credit_than_one() -> None:
    assert graced(ago=1.0, turns=50) == 2.0


def test_a_client_that_has_more_than_the_others_keeps_that_place_too() -> None:
    clock = Clock(0.0)
    ledger = Ledger({}, clock, grace_seconds=2.0)
    for client, service in (("others", 1.0), ("session", 5.0)):
        ledger.join(client)
        ledger.charge(client, service)
    ledger.leave("session")
    ledger.join("session")
    assert ledger.counter("session") == 6.0


def waiting(ledger: Ledger, **service: float) -> None:
    """Each client has a queued request and had this service."""
    for client in service:
        ledger.join(client)
        ledger.queue(client)
    for client, amount in service.items():
        ledger.charge(client, amount)


@given(st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.floats(0.1, 10), st.floats(0, 1000)), min_size=1))
def test_a_deficit_is_what_a_client_lacks_of_its_part_of_all_service(clients: dict[str, tuple[float, float]]) -> None:
    ledger = Ledger({client: weight for client, (weight, _) in clients.items()})
    waiting(ledger, **{client: service for client, (_, service) in clients.items()})
    weights, services = (sum(values) for values in zip(*clients.values(), strict=True))
    lacking = {client: services * weight / weights - service for client, (weight, service) in clients.items()}
    expected = {client: max(0.0, lacks) for client, lacks in lacking.items()}
    assert ledger.deficits() == pytest.approx(expected, abs=1e-6)


def test_who_only_runs_counts_and_lacks_nothing() -> None:
    ledger = Ledger({})
    waiting(ledger, waits=0.0)
    ledger.join("runs")
    ledger.charge("runs", 10.0)
    assert ledger.deficits() == {"waits": 5.0}


def test_who_has_left_does_not_count() -> None:
    ledger = Ledger({})
    waiting(ledger, waits=0.0, leaves=10.0)
    ledger.unqueue("leaves")
    ledger.leave("leaves")
    assert ledger.deficits() == {"waits": 0.0}


def test_service_that_was_charged_and_not_given_is_lacking() -> None:
    ledger = Ledger({})
    waiting(ledger, had=10.0, charged=10.0)
    ledger.charge("charged", -10.0)
    assert ledger.deficits() == {"had": 0.0, "charged": 5.0}


def test_without_clients_nobody_lacks_anything() -> None:
    assert Ledger({}).deficits() == {}
