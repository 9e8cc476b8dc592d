"""A gateway of its own: it names tenants, which the public door cannot before there is authentication."""

import asyncio
import itertools
import time
from typing import Any

import grpc

from common.version import PROTOCOL_VERSION
from loraplex.v1 import scheduler_pb2, scheduler_pb2_grpc, types_pb2, worker_pb2, worker_pb2_grpc

GATEWAY_ID = "fairness"


class Answer:
    """One request on its way; times are seconds of `time.perf_counter()`."""

    def __init__(self) -> None:
        self.submitted = time.perf_counter()
        self.first_token: float | None = None
        self.num_tokens = 0
        self.error = ""
        self.ended = asyncio.Event()

    @property
    def ttft_seconds(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.submitted


class TenantGateway:
    """Submits requests of tenants to a scheduler and takes their tokens from the workers."""

    def __init__(self, scheduler_address: str) -> None:
        self._channels = [grpc.aio.insecure_channel(scheduler_address)]
        self._answers: dict[str, Answer] = {}
        self._outbox: asyncio.Queue[scheduler_pb2.ConnectRequest] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._attached: dict[str, asyncio.Event] = {}
        self._known = asyncio.Event()
        self._names = itertools.count()
        # Tells a later gateway's requests from those of an earlier one.
        self._born = time.time_ns()

    async def start(self, num_workers: int) -> None:
        """Connected to the scheduler and attached to so many workers."""
        self._spawn(self._converse())
        while len(self._attached) < num_workers:
            self._known.clear()
            await self._known.wait()
        for attached in self._attached.values():
            await attached.wait()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels:
            await channel.close()

    def submit(self, tenant: str, prompt: list[int], max_tokens: int, adapter: dict[str, Any]) -> Answer:
        """Greedy, and never ending early."""
        name = f"{tenant}-{self._born}-{next(self._names)}"
        spec = types_pb2.RequestSpec(
            key=types_pb2.RequestKey(request_id=name, tenant=tenant),
            gateway_id=GATEWAY_ID,
            prompt_token_ids=prompt,
            sampling=types_pb2.SamplingParams(temperature=0.0, seed=0),
            stopping=types_pb2.StoppingParams(max_tokens=max_tokens, ignore_eos=True),
            isolation_salt=name,
            **adapter,
        )
        answer = self._answers[name] = Answer()
        self._outbox.put_nowait(scheduler_pb2.ConnectRequest(submit=scheduler_pb2.Submit(request=spec)))
        return answer

    async def _converse(self) -> None:
        call = scheduler_pb2_grpc.SchedulerServiceStub(self._channels[0]).Connect()
        hello = scheduler_pb2.GatewayHello(gateway_id=GATEWAY_ID, protocol_version=PROTOCOL_VERSION)
        await call.write(scheduler_pb2.ConnectRequest(hello=hello))
        self._spawn(self._write(call))
        async for message in call:
            if message.HasField("workers"):
                for worker in message.workers.workers:
                    if worker.address not in self._attached:
                        self._attached[worker.address] = asyncio.Event()
                        self._spawn(self._attach(worker.address))
                self._known.set()
            elif message.HasField("refused"):
                self._end(message.refused.key.request_id, message.refused.error.reason)

    async def _write(self, call: Any) -> None:
        while True:
            await call.write(await self._outbox.get())

    async def _attach(self, address: str) -> None:
        channel = grpc.aio.insecure_channel(address)
        self._channels.append(channel)
        call = worker_pb2_grpc.WorkerServiceStub(channel).Attach()
        hello = worker_pb2.AttachHello(gateway_id=GATEWAY_ID, protocol_version=PROTOCOL_VERSION)
        await call.write(worker_pb2.AttachRequest(hello=hello))
        async for message in call:
            if message.HasField("welcome"):
                self._attached[address].set()
            for sequence in message.tokens.sequences:
                self._take(sequence)

    def _take(self, sequence: worker_pb2.SequenceTokens) -> None:
        answer = self._answers.get(sequence.key.request_id)
        if answer is None:
            return
        if sequence.token_ids and answer.first_token is None:
            answer.first_token = time.perf_counter()
        answer.num_tokens += len(sequence.token_ids)
        if sequence.finish_reason:
            self._end(sequence.key.request_id, sequence.error.reason)

    def _end(self, name: str, error: str) -> None:
        if (answer := self._answers.pop(name, None)) is not None:
            answer.error = error
            answer.ended.set()

    def _spawn(self, work: Any) -> None:
        self._tasks.add(asyncio.create_task(work))
