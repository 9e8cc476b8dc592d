"""What one step tells: one message a sequence, the latest state of each, and then nothing again."""

from common.errors import Unavailable
from gpu_worker.outbox import TOKENS_TOGETHER, Outbox
from gpu_worker.sequence import Sequence, SequenceState
from loraplex.v1 import engine_pb2, scheduler_pb2, types_pb2, worker_pb2
from tests.gpu_worker.support import waiting_sequence

LENGTH = types_pb2.FINISH_REASON_LENGTH


def with_output(name: str, *tokens: int, gateway_id: str = "gateway") -> Sequence:
    sequence = waiting_sequence(name, 3, gateway_id=gateway_id)
    sequence.output_token_ids = list(tokens)
    return sequence


def messages(result: engine_pb2.StepResult) -> list[worker_pb2.SequenceTokens]:
    return [message for batch in result.tokens for message in batch.sequences]


def test_a_token_says_where_it_belongs() -> None:
    outbox = Outbox()
    outbox.token(with_output("s", 5, 6, 7))
    (message,) = messages(outbox.take())
    assert (message.token_offset, list(message.token_ids)) == (2, [7])


def test_the_last_token_and_the_end_are_one_message() -> None:
    outbox, sequence = Outbox(), with_output("s", 5)
    outbox.token(sequence)
    outbox.finish(sequence, LENGTH, counted_as="length")
    (message,) = messages(outbox.take())
    assert (list(message.token_ids), message.finish_reason) == ([5], LENGTH)


def test_an_end_without_a_token_says_how_many_came_before() -> None:
    outbox = Outbox()
    outbox.finish(with_output("s", 5, 6), types_pb2.FINISH_REASON_ABORTED, counted_as="length")
    (message,) = messages(outbox.take())
    assert (message.token_offset, list(message.token_ids)) == (2, [])


def generate(outbox: Outbox, sequence: Sequence, num_tokens: int) -> list[worker_pb2.SequenceTokens]:
    """One token a step; what the gateway was told."""
    told = []
    for token_id in range(num_tokens):
        sequence.output_token_ids.append(token_id)
        outbox.token(sequence)
        told += messages(outbox.take())
    return told


def test_who_waits_for_the_whole_answer_gets_the_first_token_at_once_and_then_many_together() -> None:
    outbox, sequence = Outbox(), with_output("s")
    sequence.whole = True
    told = generate(outbox, sequence, 2 * TOKENS_TOGETHER + 4)
    assert [message.token_offset for message in told] == [0, 1, 1 + TOKENS_TOGETHER]
    outbox.finish(sequence, LENGTH, counted_as="length")
    told += messages(outbox.take())
    assert [token_id for message in told for token_id in message.token_ids] == sequence.output_token_ids
    assert [message.finish_reason for message in told] == [0, 0, 0, LENGTH]


def test_who_reads_along_gets_every_token_at_once() -> None:
    sequence = with_output("s")
    assert [message.token_offset for message in generate(Outbox(), sequence, 40)] == list(range(40))


def test_a_later_attempt_begins_behind_what_was_delivered() -> None:
    sequence = with_output("s", 7, 8)
    sequence.whole, sequence.num_delivered = True, 2
    (first,) = generate(Outbox(), sequence, 3)
    assert (first.token_offset, list(first.token_ids), first.HasField("usage")) == (2, [0], True)


def test_the_end_of_one_does_not_ride_on_the_token_of_another() -> None:
    outbox = Outbox()
    outbox.token(with_output("s", 5))
    outbox.finish(with_output("t", 6), LENGTH, counted_as="length")
    assert [message.finish_reason for message in messages(outbox.take())] == [0, LENGTH]


def test_another_attempt_is_another_sequence() -> None:
    outbox, second = Outbox(), with_output("s", 5)
    outbox.token(with_output("s", 5))
    second.attempt = 1
    outbox.finish(second, LENGTH, counted_as="length")
    assert [message.key.attempt for message in messages(outbox.take())] == [0, 1]


def test_each_gateway_gets_its_own() -> None:
    outbox = Outbox()
    for name, gateway_id in (("s", "a"), ("t", "b"), ("u", "a")):
        outbox.token(with_output(name, 5, gateway_id=gateway_id))
    found = {
        batch.gateway_id: [message.key.request_id for message in batch.sequences] for batch in outbox.take().tokens
    }
    assert found == {"a": ["s", "u"], "b": ["t"]}


def test_a_failure_carries_its_error_to_both() -> None:
    outbox = Outbox()
    outbox.fail(with_output("s"), Unavailable("STORE_AWAY", "the store is away", retry_after_seconds=2.0))
    result = outbox.take()
    (message,), (progress,) = messages(result), result.report.progress
    assert message.error == progress.error
    assert (progress.state, progress.error.retry_after_seconds) == (scheduler_pb2.REQUEST_STATE_FAILED, 2.0)


def test_the_scheduler_hears_the_latest_state_only() -> None:
    outbox, sequence = Outbox(), with_output("s", 5)
    outbox.changed(sequence)
    sequence.state = SequenceState.RUNNING
    outbox.changed(sequence)
    states = [progress.state for progress in outbox.take().report.progress]
    assert states == [scheduler_pb2.REQUEST_STATE_RUNNING]


def test_a_revoked_sequence_is_the_schedulers_business_only() -> None:
    outbox = Outbox()
    outbox.revoked(with_output("s"))
    result = outbox.take()
    assert (messages(result), result.report.progress[0].state) == ([], scheduler_pb2.REQUEST_STATE_REVOKED)


def test_everything_is_told_once() -> None:
    outbox, sequence = Outbox(), with_output("s", 5)
    outbox.token(sequence)
    outbox.changed(sequence)
    outbox.need_adapter("default", "a")
    outbox.take()
    assert outbox.take() == engine_pb2.StepResult(report=scheduler_pb2.StepReport())
