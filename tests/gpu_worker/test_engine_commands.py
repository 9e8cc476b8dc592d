"""Commands of the scheduler, of gateways and of the face, applied between two steps."""

from pathlib import Path

import grpc
import pytest

from loraplex.v1 import engine_pb2, scheduler_pb2, types_pb2
from tests.gpu_worker.engine_driver import EngineDriver, key, new_offer
from tests.gpu_worker.tiny_model import CONTEXT, VOCAB, TinyAdapter

pytestmark = pytest.mark.usefixtures("step_mode")

PROMPT = list(range(2, 12))
ABORTED = types_pb2.FINISH_REASON_ABORTED
INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT.value[0]


@pytest.fixture
def driver(tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]) -> EngineDriver:
    return EngineDriver(tiny_checkpoint, tiny_adapters)


def states(driver: EngineDriver, name: str) -> list["scheduler_pb2.RequestState.ValueType"]:
    return [progress.state for progress in driver.progress.get(name, [])]


def batch(driver: EngineDriver, epoch: int, *commands: scheduler_pb2.Command) -> None:
    driver.send(scheduler_commands=scheduler_pb2.CommandBatch(scheduler_epoch=epoch, commands=commands))


def numbered_offer(seq: int, name: str) -> scheduler_pb2.Command:
    return scheduler_pb2.Command(seq=seq, offer=new_offer(name, PROMPT))


class TestAbort:
    @pytest.mark.parametrize("sender", ["gateway", "scheduler"])
    def test_its_pages_are_free_in_the_next_step(self, driver: EngineDriver, sender: str) -> None:
        driver.offer("s", PROMPT, max_tokens=40)
        for _ in range(3):
            driver.step()
        held = driver.memory.kv_pages
        if sender == "gateway":
            driver.send(abort={"key": key("s")})
        else:
            driver.command(abort={"key": key("s")})
        driver.step()
        assert (held > 0, driver.memory.kv_pages) == (True, 0)

    def test_the_gateway_is_told(self, driver: EngineDriver) -> None:
        driver.offer("s", PROMPT, max_tokens=40)
        driver.step()
        driver.send(abort={"key": key("s")})
        driver.step()
        assert driver.ended["s"].finish_reason == ABORTED

    def test_a_waiting_sequence_ends_too(self, driver: EngineDriver) -> None:
        driver.hold_loads = True
        driver.offer("s", PROMPT, "rank-3")
        driver.step()
        driver.send(abort={"key": key("s")})
        driver.step()
        assert driver.ended["s"].finish_reason == ABORTED

    def test_another_attempt_is_not_meant(self, driver: EngineDriver) -> None:
        driver.offer("s", PROMPT, attempt=1)
        driver.send(abort={"key": key("s", attempt=0)})
        driver.run()
        assert len(driver.tokens["s"]) == 8

    def test_an_unknown_key_is_ignored(self, driver: EngineDriver) -> None:
        driver.send(abort={"key": key("nobody")})
        driver.run()
        assert driver.ended == {}


def test_a_lost_gateway_frees_its_sequences_and_no_others(driver: EngineDriver) -> None:
    driver.offer("lost", PROMPT, max_tokens=40, gateway="gone")
    driver.offer("kept", PROMPT, max_tokens=40)
    driver.step()
    driver.send(gateway_lost={"gateway_id": "gone"})
    driver.run()
    assert (driver.ended["lost"].finish_reason, len(driver.tokens["kept"])) == (ABORTED, 40)


class TestAttempts:
    def test_a_newer_one_fences_the_older(self, driver: EngineDriver) -> None:
        driver.offer("s", PROMPT, max_tokens=40)
        driver.step()
        driver.offer("s", PROMPT, max_tokens=40, attempt=1)
        driver.run()
        ended = [(message.key.attempt, message.finish_reason) for message in driver.messages if message.finish_reason]
        assert ended == [(0, ABORTED), (1, types_pb2.FINISH_REASON_LENGTH)]

    def test_an_older_one_that_comes_late_does_not_fence_the_newer(self, driver: EngineDriver) -> None:
        driver.offer("s", PROMPT, max_tokens=4, attempt=1)
        driver.step()
        driver.offer("s", PROMPT, max_tokens=4, attempt=0)
        driver.run()
        ended = [(message.key.attempt, message.finish_reason) for message in driver.messages if message.finish_reason]
        assert ended == [(0, ABORTED), (1, types_pb2.FINISH_REASON_LENGTH)]

    def test_the_same_one_twice_is_one(self, driver: EngineDriver) -> None:
        driver.offer("s", PROMPT)
        driver.offer("s", PROMPT)
        driver.run()
        assert len(driver.tokens["s"]) == 8


class TestOrderOfCommands:
    def test_a_command_seen_before_is_void(self, driver: EngineDriver) -> None:
        batch(driver, 1, numbered_offer(1, "s"))
        batch(driver, 1, numbered_offer(1, "t"))
        driver.run()
        assert driver.ended.keys() == {"s"}

    def test_what_follows_a_command_seen_before_is_applied(self, driver: EngineDriver) -> None:
        batch(driver, 1, numbered_offer(1, "s"))
        batch(driver, 1, numbered_offer(1, "s"), numbered_offer(2, "t"))
        driver.run()
        assert driver.ended.keys() == {"s", "t"}

    def test_a_command_of_an_older_epoch_is_void(self, driver: EngineDriver) -> None:
        batch(driver, 2, numbered_offer(1, "s"))
        batch(driver, 1, numbered_offer(2, "t"))
        driver.run()
        assert driver.ended.keys() == {"s"}

    def test_a_newer_epoch_counts_from_1(self, driver: EngineDriver) -> None:
        batch(driver, 1, numbered_offer(1, "s"), numbered_offer(2, "t"))
        batch(driver, 2, numbered_offer(1, "u"))
        driver.run()
        assert driver.ended.keys() == {"s", "t", "u"}

    def test_a_gap_voids_the_rest_of_the_batch(self, driver: EngineDriver) -> None:
        batch(driver, 1, numbered_offer(1, "s"), numbered_offer(3, "t"), numbered_offer(4, "u"))
        driver.run()
        assert driver.ended.keys() == {"s"}

    def test_a_report_says_what_was_applied(self, driver: EngineDriver) -> None:
        batch(driver, 7, numbered_offer(1, "s"), numbered_offer(2, "t"), numbered_offer(4, "u"))
        driver.step()
        assert (driver.report.scheduler_epoch, driver.report.applied_seq) == (7, 2)

    def test_a_snapshot_starts_the_count_again(self, driver: EngineDriver) -> None:
        batch(driver, 1, numbered_offer(1, "s"))
        driver.send(take_snapshot={})
        batch(driver, 1, numbered_offer(1, "t"))
        driver.run()
        assert driver.ended.keys() == {"s", "t"}

    def test_a_snapshot_holds_what_is_in_flight_and_resident(self, driver: EngineDriver) -> None:
        driver.generate("done", PROMPT, "rank-3")
        driver.offer("s", PROMPT, max_tokens=40)
        driver.step()
        driver.send(take_snapshot={})
        driver.step()
        snapshot = driver.snapshots[0]
        assert [progress.key.request_id for progress in snapshot.in_flight] == ["s"]
        assert [adapter.adapter_version for adapter in snapshot.resident] == ["rank-3"]
        assert snapshot.memory.kv_pages == driver.memory.kv_pages


class TestRevoke:
    def test_a_sequence_that_holds_nothing_is_given_back(self, driver: EngineDriver) -> None:
        driver.hold_loads = True
        driver.library.clear()
        driver.offer("s", PROMPT, "rank-3")
        driver.command(revoke={"key": key("s")})
        driver.step()
        assert states(driver, "s") == [scheduler_pb2.REQUEST_STATE_REVOKED]

    def test_its_gateway_hears_nothing(self, driver: EngineDriver) -> None:
        driver.library.clear()
        driver.offer("s", PROMPT, "rank-3")
        driver.command(revoke={"key": key("s")})
        driver.run()
        assert "s" not in driver.ended

    def test_a_running_sequence_answers_with_its_state(self, driver: EngineDriver) -> None:
        driver.offer("s", PROMPT)
        driver.step()
        driver.command(revoke={"key": key("s")})
        driver.step()
        assert states(driver, "s")[-1] == scheduler_pb2.REQUEST_STATE_RUNNING

    def test_a_preempted_sequence_is_kept(self, tiny_checkpoint: Path) -> None:
        driver = EngineDriver(tiny_checkpoint, max_sequences=1)
        driver.offer("s", PROMPT, order_key=2)
        driver.step()
        driver.offer("first", PROMPT, order_key=1)
        driver.command(preempt={"key": key("s")})
        driver.step()
        driver.command(revoke={"key": key("s")})
        driver.run()
        assert len(driver.tokens["s"]) == 8


def test_a_reordered_sequence_is_admitted_first(tiny_checkpoint: Path) -> None:
    driver = EngineDriver(tiny_checkpoint, max_sequences=1)
    for name, order_key in (("first", 5), ("second", 6)):
        driver.offer(name, PROMPT, order_key=order_key)
    driver.command(reorder={"key": key("second"), "order_key": 4})
    driver.run()
    assert list(driver.ended) == ["second", "first"]


class TestPreempt:
    def test_it_changes_no_token(self, driver: EngineDriver) -> None:
        undisturbed = driver.generate("undisturbed", PROMPT, "rank-8", max_tokens=20)
        driver.offer("s", PROMPT, "rank-8", max_tokens=20)
        for _ in range(5):
            driver.step()
        driver.command(preempt={"key": key("s")})
        driver.run()
        assert driver.tokens["s"] == undisturbed

    def test_the_scheduler_is_told(self, tiny_checkpoint: Path) -> None:
        driver = EngineDriver(tiny_checkpoint, max_sequences=1)
        driver.offer("s", PROMPT, order_key=2)
        driver.step()
        driver.offer("first", PROMPT, order_key=1)
        driver.command(preempt={"key": key("s")})
        driver.step()
        assert states(driver, "s")[-1] == scheduler_pb2.REQUEST_STATE_PREEMPTED

    def test_a_sequence_whose_adapter_is_loading_can_be_preempted(self, driver: EngineDriver) -> None:
        driver.hold_loads = True
        driver.offer("s", PROMPT, "rank-8")
        driver.run()
        driver.command(preempt={"key": key("s")})
        driver.finish_loads()
        driver.run()
        assert len(driver.tokens["s"]) == 8


class TestRefusal:
    """What can never be served fails at once, alone."""

    def refused(self, driver: EngineDriver, offer: scheduler_pb2.Offer) -> types_pb2.RequestError:
        driver.offer("bystander", PROMPT)
        driver.command(offer=offer)
        driver.run()
        assert len(driver.tokens["bystander"]) == 8
        return driver.ended["s"].error

    def test_a_request_larger_than_the_pool_is_told_the_numbers(self, tiny_checkpoint: Path) -> None:
        driver = EngineDriver(tiny_checkpoint, num_pages=10)
        error = self.refused(driver, new_offer("s", PROMPT, max_tokens=20, adapter_bytes=3000))
        assert error.message == "the request needs 8 pages for 30 tokens and 3 for its adapter; the pool has 10"

    def test_a_request_that_just_fits_runs(self, tiny_checkpoint: Path) -> None:
        driver = EngineDriver(tiny_checkpoint, num_pages=10)
        assert len(driver.generate("s", PROMPT, max_tokens=30)) == 30

    def test_an_adapter_larger_than_was_said_is_noticed_when_it_comes(
        self, tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]
    ) -> None:
        driver = EngineDriver(tiny_checkpoint, tiny_adapters, num_pages=16)
        error = self.refused(driver, new_offer("s", PROMPT, "rank-8", max_tokens=8, adapter_bytes=0))
        assert error.message == "the request needs 5 pages for 18 tokens and 14 for its adapter; the pool has 16"

    def test_an_adapter_larger_than_was_said_is_noticed_when_it_is_here(
        self, tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]
    ) -> None:
        driver = EngineDriver(tiny_checkpoint, tiny_adapters, num_pages=16)
        driver.generate("small", [2], "rank-8", max_tokens=2)
        assert self.refused(driver, new_offer("s", PROMPT, "rank-8")).reason == "REQUEST_TOO_LARGE"

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ([], "the request has 0 tokens; the model takes 1 to 96"),
            ([2] * (CONTEXT + 1), "the request has 97 tokens; the model takes 1 to 96"),
            ([2, VOCAB], "token id 64 is not in the vocabulary of 64"),
        ],
        ids=["empty", "longer-than-the-context", "outside-the-vocabulary"],
    )
    def test_a_prompt_that_would_break_the_batch_is_refused(
        self, driver: EngineDriver, prompt: list[int], message: str
    ) -> None:
        error = self.refused(driver, new_offer("s", prompt))
        assert (error.code, error.message) == (INVALID_ARGUMENT, message)

    def test_a_prompt_as_long_as_the_context_gets_one_token(self, driver: EngineDriver) -> None:
        assert len(driver.generate("s", [2] * CONTEXT)) == 1


def test_the_warm_up_leaves_no_trace(driver: EngineDriver) -> None:
    report = driver.step().report
    expected = scheduler_pb2.StepReport(step_number=report.step_number, memory=driver.ready.memory)
    assert report == expected
    assert isinstance(driver.ready, engine_pb2.EngineReady)
