"""A hundred streams at once, of which some stop, some are cancelled and some run out of time."""

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc

from loraplex.v1 import scheduler_pb2, types_pb2, worker_pb2
from tests.gateway.conftest import Fleet, ask, read_all
from tests.gateway.fakes import token_ids, tokens

NUM_STREAMS = 100
# Far more than it takes to place those that have one; they come last.
DEADLINE_SECONDS = 15.0
KINDS = ("length", "stop", "cancelled", "deadline")
CAUSES = {
    scheduler_pb2.ABORT_CAUSE_STOP: "stop",
    scheduler_pb2.ABORT_CAUSE_CANCELLED: "cancelled",
    scheduler_pb2.ABORT_CAUSE_DEADLINE: "deadline",
}
TEXT = "the quick brown fox END jumps"


def call_of(fleet: Fleet, kind: str, request_id: str) -> Any:
    stopping = types_pb2.StoppingParams(stop=["END"] if kind == "stop" else [])
    timeout = DEADLINE_SECONDS if kind == "deadline" else None
    return fleet.api.GenerateStream(ask(stopping=stopping), timeout=timeout, metadata=[("x-request-id", request_id)])


async def outcome(call: Any, kind: str) -> str:
    """How the stream ended for its client, which leaves after the first message when it is to cancel."""
    try:
        if kind == "cancelled":
            await call.read()
            call.cancel()
        reason = (await read_all(call))[-1].outputs[0].finish.reason
    except asyncio.CancelledError:
        return "cancelled"
    except grpc.aio.AioRpcError as error:
        return "deadline" if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED else str(error.code())
    return "stop" if reason == types_pb2.FINISH_REASON_STOP else "length"


def pieces(key: types_pb2.RequestKey, kind: str, chance: random.Random) -> Iterator[worker_pb2.SequenceTokens]:
    """The text in pieces of any size; only what is not cut off gets to the end."""
    ids, sent = token_ids(TEXT), 0
    while sent < len(ids):
        piece = ids[sent : sent + chance.randint(1, 6)]
        last = sent + len(piece) == len(ids)
        yield tokens(key, sent, piece, finish=last and kind == "length")
        sent += len(piece)


async def produce(fleet: Fleet, waiting: list[Iterator[worker_pb2.SequenceTokens]], chance: random.Random) -> None:
    """A piece of some of the outputs in each step, until all are whole."""
    while waiting:
        step = {output: next(output, None) for output in chance.sample(waiting, min(20, len(waiting)))}
        await fleet.worker.say(*(piece for piece in step.values() if piece is not None))
        waiting = [output for output in waiting if step.get(output, True) is not None]


async def test_every_stream_ends_once_and_the_causes_agree_with_the_clients(fleet: Fleet) -> None:
    chance = random.Random(7)
    kinds = {f"r{index}": chance.choice(KINDS) for index in range(NUM_STREAMS)}
    outcomes: dict[str, asyncio.Task[str]] = {}
    keys: list[types_pb2.RequestKey] = []
    for late in (False, True):
        together = {request_id: kind for request_id, kind in kinds.items() if (kind == "deadline") is late}
        for request_id, kind in together.items():
            outcomes[request_id] = asyncio.create_task(outcome(call_of(fleet, kind, request_id), kind))
        keys += [await fleet.running() for _ in together]
    await produce(fleet, [pieces(key, kinds[key.request_id], chance) for key in keys], chance)
    assert {request_id: await task for request_id, task in outcomes.items()} == kinds
    expected = Counter(kind for kind in kinds.values() if kind != "length")
    aborts = [await fleet.worker.aborts.get() for _ in range(expected.total())]
    assert Counter(CAUSES[abort.cause] for abort in aborts) == expected
    assert {abort.key.request_id for abort in aborts} == {name for name, kind in kinds.items() if kind != "length"}
    assert fleet.worker.aborts.empty()
    assert len(fleet.gateway.table) == 0
