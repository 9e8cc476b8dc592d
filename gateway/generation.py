"""The way of one generate call: check, tokenise, resolve, submit, and turn what the worker sends into answers."""

import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from common.errors import ResourceExhausted
from gateway.answers import AnswerWriter
from gateway.directory import AdapterDirectory
from gateway.fleet import Fleet
from gateway.metrics import GatewayMetrics
from gateway.readiness import Readiness
from gateway.requests import InFlight, RequestTable
from gateway.scheduler_link import SchedulerLink
from gateway.tokenization import TextTokenizer
from gateway.validation import GenerateSpec, check_token_ids, fit_context, validate
from gateway.worker_links import WorkerLinks
from loraplex.v1 import adapter_store_pb2, gateway_pb2, types_pb2

RETRY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, under which id, and how many seconds are left (None: no deadline)."""

    tenant: str
    request_id: str
    remaining_seconds: float | None


class Generation:
    """One request in flight. `close()` must be called, and frees it everywhere if it has not ended."""

    def __init__(
        self,
        in_flight: InFlight,
        answers: AnswerWriter,
        started: float,
        *,
        table: RequestTable,
        scheduler: SchedulerLink,
        workers: WorkerLinks,
        metrics: GatewayMetrics,
    ) -> None:
        self._in_flight = in_flight
        self._answers = answers
        self._last_news = started
        self._table = table
        self._scheduler = scheduler
        self._workers = workers
        self._metrics = metrics

    async def answers(self) -> AsyncGenerator[gateway_pb2.GenerateResponse, None]:
        """Deltas as they come; raises the request's error. While the reader is busy deltas grow instead of queueing."""
        first, ended = True, False
        while not ended:
            await self._in_flight.wait()
            delta = self._in_flight.take()
            ended = delta.usage is not None
            if delta.num_tokens:
                now = time.monotonic()
                tenant = self._in_flight.key.tenant
                self._metrics.tokens(tenant, delta.num_tokens, now - self._last_news, first=first)
                first, self._last_news = False, now
            if (response := self._answers.write(delta)) is not None:
                yield response

    def close(self) -> None:
        """Idempotent."""
        in_flight = self._in_flight
        if not self._table.remove(in_flight) or in_flight.ended_remotely:
            return
        if in_flight.worker_id:
            self._workers.abort(in_flight.key, in_flight.worker_id)
        self._scheduler.abort(in_flight.key)


class Generator:
    """Starts generations."""

    def __init__(
        self,
        *,
        table: RequestTable,
        fleet: Fleet,
        directory: AdapterDirectory,
        scheduler: SchedulerLink,
        workers: WorkerLinks,
        readiness: Readiness,
        metrics: GatewayMetrics,
        max_inflight_requests: int,
    ) -> None:
        self._table = table
        self._fleet = fleet
        self._directory = directory
        self._scheduler = scheduler
        self._workers = workers
        self._readiness = readiness
        self._metrics = metrics
        self._max_inflight_requests = max_inflight_requests

    async def start(self, request: gateway_pb2.GenerateRequest, caller: Caller) -> Generation:
        """Submits the request. Raises whatever is wrong with it, or Unavailable when nobody can run it now."""
        started = time.monotonic()
        self._readiness.check()
        self._check_room()
        tokenizer = self.tokenizer
        spec = validate(request, self._fleet.limits)
        prompt = await self._prompt_ids(spec, tokenizer)
        adapter = await self.resolve(caller.tenant, spec.adapter_id, spec.adapter_version)
        # The worker may have been lost meanwhile.
        self._readiness.check()
        request_spec = self._request_spec(spec, prompt, adapter, caller)
        deadline = None if caller.remaining_seconds is None else started + caller.remaining_seconds
        in_flight = InFlight(request_spec, deadline)
        self._table.add(in_flight)
        generation = Generation(
            in_flight,
            AnswerWriter(request_spec, tokenizer),
            started,
            table=self._table,
            scheduler=self._scheduler,
            workers=self._workers,
            metrics=self._metrics,
        )
        try:
            self._scheduler.submit(in_flight)
        except BaseException:
            generation.close()
            raise
        self._metrics.submitted(caller.tenant, len(prompt))
        return generation

    async def tokenize(self, text: str) -> list[int]:
        """Raises Unavailable before the tokenizer is known."""
        self._readiness.check()
        return await self.tokenizer.encode(text)

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
        if len(self._table) >= self._max_inflight_requests:
            limit = self._max_inflight_requests
            message = f"{limit} requests are in flight at this gateway; that is its limit"
            raise ResourceExhausted("TOO_MANY_REQUESTS", message, retry_after_seconds=RETRY_SECONDS)

    async def _prompt_ids(self, spec: GenerateSpec, tokenizer: TextTokenizer) -> list[int]:
        limits = self._fleet.limits
        ids = list(spec.token_ids) if spec.text is None else await tokenizer.encode(spec.text)
        fit_context(spec.stopping, len(ids), limits)
        if spec.text is not None:
            check_token_ids(ids, limits, "text")
        return ids

    def _request_spec(
        self, spec: GenerateSpec, prompt: list[int], adapter: adapter_store_pb2.Adapter, caller: Caller
    ) -> types_pb2.RequestSpec:
        request = types_pb2.RequestSpec(
            key=types_pb2.RequestKey(request_id=caller.request_id, attempt=0, tenant=caller.tenant),
            gateway_id=self._workers.gateway_id,
            adapter_id=adapter.adapter_id,
            adapter_version=adapter.adapter_version,
            adapter_bytes=adapter.packed_bytes,
            prompt_token_ids=prompt,
            sampling=spec.sampling,
            stopping=spec.stopping,
            output=spec.output,
            scheduling=spec.scheduling,
            isolation_salt=caller.tenant,
        )
        if not spec.sampling.HasField("seed"):
            request.sampling.seed = secrets.randbits(64)
        return request
