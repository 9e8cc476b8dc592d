"""A gateway of a few lines: it answers from a script and keeps what it was asked."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from loraplex.v1 import (
    adapter_store_pb2,
    adapter_store_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
    scheduler_pb2,
    scheduler_pb2_grpc,
    types_pb2,
)

KNOWN_ADAPTERS = ("alpha", "beta", "gamma")
HOLD_SECONDS = 10.0


def status(code: int, reason: str, message: str, *, retry_after_seconds: float | None = None) -> status_pb2.Status:
    """As the services write it: ErrorInfo, and RetryInfo where a retry may help."""
    details = [error_details_pb2.ErrorInfo(reason=reason, domain="loraplex", metadata={"limit": "8"})]
    if retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(retry_after_seconds * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return status_pb2.Status(code=code, message=message, details=packed)


def _abort(context: Any, failure: status_pb2.Status) -> NoReturn:
    context.abort_with_status(rpc_status.to_status(failure))
    raise AssertionError("abort returns only by raising")


class FakeGateway:
    """Answers a prompt with its words, one message each.

    `failure` fails every call, or the first `failing_calls`; a stream fails after `words_before_failure`. With
    `holds_streams` a stream stops after its first word until the client leaves.
    """

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.request_ids: list[str] = []
        self.failure: status_pb2.Status | None = None
        self.failing_calls = 10**9
        self.words_before_failure = 0
        self.serving = True
        self.waiting_tenants: list[scheduler_pb2.TenantSnapshot] = []
        self.holds_streams = False
        self.stream_ended = Event()

    def _note(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.request_ids.append(dict(context.invocation_metadata()).get("x-request-id", ""))
        if self.failure and not self.words_before_failure and len(self.requests) <= self.failing_calls:
            _abort(context, self.failure)

    def Generate(self, request: gateway_pb2.GenerateRequest, context: Any) -> gateway_pb2.GenerateResponse:
        self._note(request, context)
        chosen = types_pb2.TokenLogprob(token_id=5, logprob=-0.5, text="O")
        position = types_pb2.PositionLogprobs(chosen=chosen, top=[chosen])
        finish = gateway_pb2.Finish(reason=types_pb2.FINISH_REASON_STOP, stop="END")
        outputs = [
            gateway_pb2.Output(
                index=index, text=request.text.upper(), token_ids=[5, 6], logprobs=[position], finish=finish
            )
            for index in range(request.output.n or 1)
        ]
        return gateway_pb2.GenerateResponse(
            request_id=self.request_ids[-1],
            adapter_version="digest",
            seed=7,
            outputs=outputs,
            usage=types_pb2.Usage(prompt_tokens=3, completion_tokens=2),
            prompt_logprobs=[types_pb2.PositionLogprobs(), position],
        )

    def Tokenize(self, request: gateway_pb2.TokenizeRequest, context: Any) -> gateway_pb2.TokenizeResponse:
        self._note(request, context)
        return gateway_pb2.TokenizeResponse(token_ids=types_pb2.TokenIds(ids=[5, 6]))

    def GenerateStream(
        self, request: gateway_pb2.GenerateRequest, context: Any
    ) -> Iterator[gateway_pb2.GenerateResponse]:
        self._note(request, context)
        context.add_callback(self.stream_ended.set)
        words = request.text.split()
        for offset, word in enumerate(words):
            if self.failure and 0 < self.words_before_failure == offset:
                _abort(context, self.failure)
            output = gateway_pb2.Output(text=word, token_offset=offset)
            response = gateway_pb2.GenerateResponse(request_id=self.request_ids[-1], outputs=[output])
            if offset == len(words) - 1:
                response.outputs[0].finish.reason = types_pb2.FINISH_REASON_LENGTH
                response.usage.completion_tokens = len(words)
            yield response
            if self.holds_streams:
                self.stream_ended.wait(HOLD_SECONDS)

    def ListModels(self, request: gateway_pb2.ListModelsRequest, context: Any) -> gateway_pb2.ListModelsResponse:
        """The base model, then one adapter a page."""
        self._note(request, context)
        index = int(request.page_token or 0)
        names = ["", *KNOWN_ADAPTERS]
        model = gateway_pb2.Model(adapter_id=names[index], base_model="tiny", max_context_tokens=128)
        following = str(index + 1) if index + 1 < len(names) else ""
        return gateway_pb2.ListModelsResponse(models=[model], next_page_token=following)

    def UploadAdapter(self, request_iterator: Any, context: Any) -> adapter_store_pb2.UploadAdapterResponse:
        messages = list(request_iterator)
        self._note(messages, context)
        adapter = adapter_store_pb2.Adapter(adapter_id=messages[0].header.adapter_id, adapter_version="digest")
        return adapter_store_pb2.UploadAdapterResponse(adapter=adapter, created=True, warnings=["a warning"])

    def ListAdapters(
        self, request: adapter_store_pb2.ListAdaptersRequest, context: Any
    ) -> adapter_store_pb2.ListAdaptersResponse:
        """One adapter a page."""
        self._note(request, context)
        index = int(request.page_token or 0)
        adapter = adapter_store_pb2.Adapter(adapter_id=KNOWN_ADAPTERS[index], packed_bytes=2**20)
        following = str(index + 1) if index + 1 < len(KNOWN_ADAPTERS) else ""
        return adapter_store_pb2.ListAdaptersResponse(adapters=[adapter], next_page_token=following)

    def GetAdapter(self, request: adapter_store_pb2.GetAdapterRequest, context: Any) -> adapter_store_pb2.Adapter:
        self._note(request, context)
        effect = adapter_store_pb2.ModuleEffect(
            module=types_pb2.LORA_MODULE_Q_PROJ, num_layers=2, min_lora_rank=4, max_lora_rank=8, delta_norm=1.5
        )
        return adapter_store_pb2.Adapter(
            adapter_id=request.adapter_id, adapter_version="digest", max_lora_rank=8, modules=[effect]
        )

    def SetAlias(self, request: adapter_store_pb2.SetAliasRequest, context: Any) -> adapter_store_pb2.Adapter:
        self._note(request, context)
        return adapter_store_pb2.Adapter(adapter_id=request.adapter_id, adapter_version=request.adapter_version)

    def ExportAdapter(
        self, request: adapter_store_pb2.ExportAdapterRequest, context: Any
    ) -> Iterator[adapter_store_pb2.ExportAdapterResponse]:
        """A config and weights in two chunks; a failure comes between those."""
        self.requests.append(request)
        yield adapter_store_pb2.ExportAdapterResponse(adapter=adapter_store_pb2.Adapter(adapter_id=request.adapter_id))
        weights = adapter_store_pb2.ADAPTER_FILE_WEIGHTS
        for kind, data in ((adapter_store_pb2.ADAPTER_FILE_CONFIG, b"{}"), (weights, b"one "), (weights, b"two")):
            if data == b"two" and self.failure:
                _abort(context, self.failure)
            yield adapter_store_pb2.ExportAdapterResponse(chunk=adapter_store_pb2.UploadChunk(file=kind, data=data))

    def DeleteAdapter(
        self, request: adapter_store_pb2.DeleteAdapterRequest, context: Any
    ) -> adapter_store_pb2.DeleteAdapterResponse:
        self._note(request, context)
        return adapter_store_pb2.DeleteAdapterResponse(adapter_version="digest")

    def GetState(self, request: scheduler_pb2.GetStateRequest, context: Any) -> scheduler_pb2.GetStateResponse:
        self._note(request, context)
        info = scheduler_pb2.WorkerInfo(worker_id="worker-0", state=scheduler_pb2.WORKER_STATE_READY)
        workers = [scheduler_pb2.WorkerSnapshot(info=info)]
        return scheduler_pb2.GetStateResponse(scheduler_epoch=3, workers=workers, tenants=self.waiting_tenants)

    def check_health(self, request: bytes, context: Any) -> bytes:
        """grpc.health.v1 on the wire: field 1 is SERVING or NOT_SERVING."""
        return b"\x08\x01" if self.serving else b"\x08\x02"


@contextmanager
def running(credentials: grpc.ServerCredentials | None = None) -> Iterator[tuple[FakeGateway, str]]:
    """The fake and its address, over TLS with `credentials`. What it does not answer is UNIMPLEMENTED."""
    servicers = (
        gateway_pb2_grpc.GatewayServiceServicer,
        adapter_store_pb2_grpc.AdapterStoreServiceServicer,
        scheduler_pb2_grpc.SchedulerServiceServicer,
    )
    fake = type("Servicer", (FakeGateway, *servicers), {})()
    server = grpc.server(ThreadPoolExecutor(max_workers=8))
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(fake, server)
    adapter_store_pb2_grpc.add_AdapterStoreServiceServicer_to_server(fake, server)
    scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(fake, server)
    check = grpc.unary_unary_rpc_method_handler(fake.check_health, bytes, bytes)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check})])
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield fake, f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()
