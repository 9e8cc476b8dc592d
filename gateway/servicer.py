"""GatewayService: check, call, map, return."""

from functools import partial
from typing import Any

from common.errors import InvalidArgument
from common.logs import request_id_var
from gateway.answers import merge
from gateway.delivery import DeliveryLimits, check_size, deliver
from gateway.directory import AdapterDirectory
from gateway.fleet import Fleet
from gateway.generation import Caller, Generation, Generator
from gateway.identity import tenant_of
from gateway.metrics import Call, GatewayMetrics
from gateway.readiness import Readiness
from gateway.validation import page_size_of
from loraplex.v1 import gateway_pb2, gateway_pb2_grpc, scheduler_pb2, types_pb2

# In front of the last id of a page, so that the token after the base model, which has no id, is not empty.
_PAGE_PREFIX = "after:"


class GatewayServicer(gateway_pb2_grpc.GatewayServiceServicer):
    """What users call."""

    def __init__(
        self,
        generator: Generator,
        *,
        fleet: Fleet,
        directory: AdapterDirectory,
        readiness: Readiness,
        metrics: GatewayMetrics,
        limits: DeliveryLimits,
    ) -> None:
        self._generator = generator
        self._fleet = fleet
        self._directory = directory
        self._readiness = readiness
        self._metrics = metrics
        self._limits = limits

    async def Generate(self, request: gateway_pb2.GenerateRequest, context: Any) -> gateway_pb2.GenerateResponse:
        with self._metrics.call("Generate", context) as call:
            generation = await self._start(request, context, call, whole=True)
            try:
                whole = merge([answer async for answer in generation.answers()])
                check_size(whole, self._limits.max_message_bytes)
                return whole
            finally:
                generation.close()

    async def GenerateStream(self, request: gateway_pb2.GenerateRequest, context: Any) -> None:  # type: ignore[override]  # writes to the context, which can be given up
        with self._metrics.call("GenerateStream", context) as call:
            generation = await self._start(request, context, call, whole=False)
            try:
                in_flight, give_up = generation.in_flight, partial(self._give_up, generation)
                await deliver(generation.answers(), context.write, in_flight, self._limits, give_up)
            finally:
                generation.close()

    async def Tokenize(self, request: gateway_pb2.TokenizeRequest, context: Any) -> gateway_pb2.TokenizeResponse:
        with self._metrics.call("Tokenize", context):
            ids = await self._generator.tokenize(request, tenant_of(context))
            return gateway_pb2.TokenizeResponse(token_ids=types_pb2.TokenIds(ids=ids))

    async def ListModels(self, request: gateway_pb2.ListModelsRequest, context: Any) -> gateway_pb2.ListModelsResponse:
        with self._metrics.call("ListModels", context):
            page_size = page_size_of(request.page_size)
            after = _last_id_of(request.page_token)
            self._readiness.check()
            models = self._models(tenant_of(context), after)
            page, rest = models[:page_size], models[page_size:]
            token = _PAGE_PREFIX + page[-1].adapter_id if rest else ""
            return gateway_pb2.ListModelsResponse(models=page, next_page_token=token)

    def _give_up(self, generation: Generation) -> None:
        """Its client does not read."""
        self._metrics.slow_clients.inc()
        generation.close(scheduler_pb2.ABORT_CAUSE_SLOW_READER)

    async def _start(
        self, request: gateway_pb2.GenerateRequest, context: Any, call: Call, *, whole: bool
    ) -> Generation:
        remaining = context.time_remaining()
        caller = Caller(tenant_of(context), request_id_var.get(), remaining, whole)
        call.tenant = caller.tenant
        generation = await self._generator.start(request, caller)
        call.adapter_id = generation.in_flight.spec.adapter_id
        # When a call ends while a message waits to be sent, the handler's `finally` runs only once it is collected.
        context.add_done_callback(lambda _: generation.close())
        return generation

    def _models(self, tenant: str, after: str | None) -> list[gateway_pb2.Model]:
        """The base model (when `after` is None), then the adapters whose id is greater than `after`."""
        model = self._fleet.model
        assert model is not None
        limit = model.geometry.max_context_tokens
        base = gateway_pb2.Model(base_model=model.name, max_context_tokens=limit)
        adapters = [
            gateway_pb2.Model(
                adapter_id=adapter.adapter_id,
                adapter_version=adapter.adapter_version,
                base_model=model.name,
                max_context_tokens=limit,
            )
            for adapter in self._directory.of_tenant(tenant)
            if adapter.adapter_id > (after or "")
        ]
        return [base, *adapters] if after is None else adapters


def _last_id_of(page_token: str) -> str | None:
    """The id a page ended with; None for the first page."""
    if not page_token:
        return None
    if not page_token.startswith(_PAGE_PREFIX):
        raise InvalidArgument("INVALID_FIELD", "page_token is not one of a page before", field="page_token")
    return page_token.removeprefix(_PAGE_PREFIX)
