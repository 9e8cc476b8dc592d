"""The way of one generate call: check, tokenise, resolve, submit, and turn what the worker sends into answers."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from common.errors import DeadlineExceeded, ResourceExhausted
from common.prefix_chain import prefix_hashes
from gateway import deadlines
from gateway.answers import AnswerWriter
from gateway.delivery import check_prompt_logprobs
from gateway.directory import AdapterDirectory
from gateway.fleet import Fleet
from gateway.metrics import GatewayMetrics
from gateway.prompts import Prompt, context_of, echo_of, read_prompt
from gateway.quotas import Quotas
from gateway.readiness import Readiness
from gateway.requests import Delta, InFlight, RequestTable
from gateway.scheduler_link import SchedulerLink
from gateway.tokenization import TextTokenizer
from gateway.validation import GenerateSpec, check_adapter, check_token_ids, fit_context, prompt_of, validate
from gateway.worker_links import WorkerLinks
from loraplex.v1 import adapter_store_pb2, gateway_pb2, scheduler_pb2, types_pb2

RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, under which id, how many seconds are left (None: no deadline), and whether for a whole answer."""

    tenant: str
    request_id: str
    remaining_seconds: float | None
    whole: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """Who has to hear about a request, and where it is counted."""

    table: RequestTable
    scheduler: SchedulerLink
    workers: WorkerLinks
    metrics: GatewayMetrics


class Generation:
    """One request in flight. `close()` must be called, and frees it everywhere if it has not ended."""

    def __init__(
        self, in_flight: InFlight, answers: AnswerWriter, started: float, peers: Peers, max_seconds: float
    ) -> None:
        self.in_flight = in_flight
        too_long = DeadlineExceeded("DEADLINE_EXCEEDED", f"a request may take {max_seconds:g} s; and no longer")
        self._expiry = asyncio.get_running_loop().call_later(max_seconds, in_flight.fail, too_long)
        self._answers = answers
        self._started = started
        self._last_news = started
        self._peers = peers

    async def answers(self) -> AsyncGenerator[gateway_pb2.GenerateResponse, None]:
        """Deltas as they come; raises the request's error. While the reader is busy deltas grow instead of queueing."""
        while not self._answers.ended:
            await self.in_flight.wait()
            delta = self.in_flight.take()
            self._count(delta)
            response = self._answers.write(delta)
            self._end_stopped()
            if response is not None:
                yield response

    def close(self, cause: "scheduler_pb2.AbortCause.ValueType | None" = None) -> None:
        """Idempotent. Without a cause the client is gone, or its time is up."""
        in_flight = self.in_flight
        self._expiry.cancel()
        if not self._peers.table.remove(in_flight) or in_flight.ended_remotely:
            return
        abort = scheduler_pb2.Abort(key=in_flight.key, cause=self._cause() if cause is None else cause)
        if in_flight.worker_id:
            self._peers.workers.abort(abort, in_flight.worker_id)
        self._peers.scheduler.abort(abort)

    def _count(self, delta: Delta) -> None:
        metrics, tenant = self._peers.metrics, self.in_flight.key.tenant
        if delta.num_tokens:
            now = time.monotonic()
            seconds = now - self._last_news
            if self._last_news == self._started:
                tier, base = self.in_flight.tier, not self.in_flight.spec.adapter_id
                metrics.first_tokens(tenant, delta.num_tokens, seconds, tier, base=base)
            else:
                metrics.more_tokens(tenant, delta.num_tokens, seconds)
            self._last_news = now
        if delta.usage is not None and self.in_flight.complete:
            metrics.finished(tenant, delta.usage.cached_tokens)

    def _end_stopped(self) -> None:
        """Tells the worker which outputs a stop string has ended; the scheduler hears it from the worker."""
        in_flight = self.in_flight
        if stopped := in_flight.end(self._answers.stopped):
            abort = scheduler_pb2.Abort(key=in_flight.key, output_indexes=stopped, cause=scheduler_pb2.ABORT_CAUSE_STOP)
            told = self._peers.workers.abort(abort, in_flight.worker_id)
            in_flight.ended_remotely = told and in_flight.complete

    def _cause(self) -> "scheduler_pb2.AbortCause.ValueType":
        in_flight = self.in_flight
        if isinstance(in_flight.error, DeadlineExceeded):
            return scheduler_pb2.ABORT_CAUSE_DEADLINE
        if in_flight.error is not None:
            return scheduler_pb2.ABORT_CAUSE_UNSPECIFIED
        if in_flight.complete:
            return scheduler_pb2.ABORT_CAUSE_STOP
        if in_flight.deadline is not None:
            remaining = in_flight.deadline - time.monotonic()
            if deadlines.has_passed(remaining, in_flight.deadline - self._started):
                return scheduler_pb2.ABORT_CAUSE_DEADLINE
        return scheduler_pb2.ABORT_CAUSE_CANCELLED


class Generator:
    """Starts generations."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        directory: AdapterDirectory,
        readiness: Readiness,
        peers: Peers,
        quotas: Quotas,
        max_inflight_requests: int,
        max_request_seconds: float,
        max_buffered_bytes: int,
        max_message_bytes: int,
    ) -> None:
        self._fleet = fleet
        self._directory = directory
        self._readiness = readiness
        self._peers = peers
        self._quotas = quotas
        self._max_inflight_requests = max_inflight_requests
        self._max_request_seconds = max_request_seconds
        self._max_buffered_bytes = max_buffered_bytes
        self._max_message_bytes = max_message_bytes

    async def start(self, request: gateway_pb2.GenerateRequest, caller: Caller) -> Generation:
        """Submits the request. Raises whatever is wrong with it, or Unavailable when nobody can run it now."""
        started = time.monotonic()
        self._readiness.check()
        self._check_room()
        tokenizer = self.tokenizer
        spec = validate(request, self._fleet.limits)
        adapter = await self.resolve(caller.tenant, spec.adapter_id, spec.adapter_version)
        prompt = await read_prompt(spec.prompt, tokenizer, adapter.chat_template)
        self._check_prompt(spec, prompt)
        await self._quotas.take(caller.tenant, len(prompt.token_ids) + spec.stopping.max_tokens * spec.output.n)
        # The worker may have been lost meanwhile.
        self._readiness.check()
        request_spec = self._request_spec(spec, prompt.token_ids, adapter, caller)
        deadline = None if caller.remaining_seconds is None else started + caller.remaining_seconds
        in_flight = InFlight(request_spec, deadline, max_buffered_bytes=self._max_buffered_bytes)
        echo = echo_of(prompt, tokenizer) if spec.output.echo else ""
        answers = AnswerWriter(request_spec, tokenizer, context=context_of(prompt), echo=echo)
        self._peers.table.add(in_flight)
        generation = Generation(in_flight, answers, started, self._peers, self._max_request_seconds)
        try:
            self._peers.scheduler.submit(in_flight)
        except BaseException:
            generation.close()
            raise
        self._peers.metrics.submitted(caller.tenant, len(prompt.token_ids))
        return generation

    async def tokenize(self, request: gateway_pb2.TokenizeRequest, tenant: str) -> list[int]:
        """Raises Unavailable before the tokenizer is known."""
        check_adapter(request.adapter_id)
        self._readiness.check()
        tokenizer = self.tokenizer
        spec = prompt_of(request, self._fleet.limits)
        adapter = await self.resolve(tenant, request.adapter_id)
        return (await read_prompt(spec, tokenizer, adapter.chat_template)).token_ids

    async def resolve(self, tenant: str, adapter_id: str, adapter_version: str = "") -> adapter_store_pb2.Adapter:
        """The adapter; one without id or bytes for the base model. Raises NotFound or Unavailable."""
        if not adapter_id:
            return adapter_store_pb2.Adapter()
        return await self._directory.resolve(tenant, adapter_id, adapter_version)

    @property
    def tokenizer(self) -> TextTokenizer:
        """Of the current model; a worker must have joined."""
        assert self._fleet.tokenizer is not None
        return self._fleet.tokenizer

    def _check_room(self) -> None:
        if len(self._peers.table) >= self._max_inflight_requests:
            limit = self._max_inflight_requests
            message = f"{limit} requests are in flight at this gateway; that is its limit"
            raise ResourceExhausted("TOO_MANY_REQUESTS", message, retry_after_seconds=RETRY_SECONDS)

    def _check_prompt(self, spec: GenerateSpec, prompt: Prompt) -> None:
        fit_context(spec.stopping, len(prompt.token_ids), self._fleet.limits)
        check_prompt_logprobs(spec.output, len(prompt.token_ids), self._max_message_bytes)
        if prompt.text is not None:
            check_token_ids(prompt.token_ids, self._fleet.limits, "text")

    def _request_spec(
        self, spec: GenerateSpec, prompt: list[int], adapter: adapter_store_pb2.Adapter, caller: Caller
    ) -> types_pb2.RequestSpec:
        request = types_pb2.RequestSpec(
            key=types_pb2.RequestKey(request_id=caller.request_id, attempt=0, tenant=caller.tenant),
            gateway_id=self._peers.workers.gateway_id,
            adapter_id=adapter.adapter_id,
            adapter_version=adapter.adapter_version,
            adapter_bytes=adapter.packed_bytes,
            prompt_token_ids=prompt,
            sampling=spec.sampling,
            stopping=spec.stopping,
            output=spec.output,
            scheduling=spec.scheduling,
            isolation_salt=caller.tenant,
            prefix_hashes=prefix_hashes(adapter.adapter_version, caller.tenant, prompt),
            whole=caller.whole,
        )
        if not spec.sampling.HasField("seed"):
            request.sampling.seed = secrets.randbits(64)
        return request
