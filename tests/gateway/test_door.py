"""The other calls, and requests that are not worth a worker's time."""

from typing import Any

import grpc
import pytest
from prometheus_client import generate_latest

from gateway.servicer import GatewayServicer
from gateway.store_proxy import AdapterStoreProxy
from loraplex.v1 import adapter_store_pb2, gateway_pb2, types_pb2
from tests.gateway.conftest import Fleet, StartFleet, ask, failure, read_all, reason_of, retry_seconds_of
from tests.gateway.fakes import VERSION, token_ids, tokens


async def test_the_base_model_is_listed_first_then_adapters_by_id(fleet: Fleet) -> None:
    response = await fleet.api.ListModels(gateway_pb2.ListModelsRequest())
    assert [model.adapter_id for model in response.models] == ["", "alpha", "zebra"]
    assert [model.adapter_version for model in response.models] == ["", VERSION, VERSION]
    assert {(model.base_model, model.max_context_tokens) for model in response.models} == {("tiny", 64)}
    assert response.next_page_token == ""


@pytest.mark.parametrize("page_size", [1, 2, 3])
async def test_pages_together_are_the_list(fleet: Fleet, page_size: int) -> None:
    found, token, pages = [], "", 0
    while pages == 0 or token:
        request = gateway_pb2.ListModelsRequest(page_size=page_size, page_token=token)
        response = await fleet.api.ListModels(request)
        found += [model.adapter_id for model in response.models]
        token, pages = response.next_page_token, pages + 1
    assert found == ["", "alpha", "zebra"]
    assert pages == -(-3 // page_size)


@pytest.mark.parametrize("fields", [{"page_size": 1001}, {"page_token": "alpha"}], ids=["page size", "page token"])
async def test_a_bad_page_is_refused(fleet: Fleet, fields: dict[str, Any]) -> None:
    error = await failure(fleet.api.ListModels(gateway_pb2.ListModelsRequest(**fields)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_text_is_tokenised_as_for_generate(fleet: Fleet) -> None:
    response = await fleet.api.Tokenize(gateway_pb2.TokenizeRequest(text="hé", adapter_id="alpha"))
    assert response.token_ids.ids == [1, *token_ids("hé")]


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        pytest.param(gateway_pb2.TokenizeRequest(text=""), grpc.StatusCode.INVALID_ARGUMENT, id="empty"),
        pytest.param(
            gateway_pb2.TokenizeRequest(chat=types_pb2.ChatPrompt()), grpc.StatusCode.INVALID_ARGUMENT, id="empty chat"
        ),
        pytest.param(gateway_pb2.TokenizeRequest(), grpc.StatusCode.INVALID_ARGUMENT, id="nothing"),
        pytest.param(
            gateway_pb2.TokenizeRequest(text="a", adapter_id="ghost"), grpc.StatusCode.NOT_FOUND, id="unknown adapter"
        ),
    ],
)
async def test_what_cannot_be_tokenised(
    fleet: Fleet, request_: gateway_pb2.TokenizeRequest, code: grpc.StatusCode
) -> None:
    assert (await failure(fleet.api.Tokenize(request_))).code() is code


@pytest.mark.parametrize(
    ("request_", "code", "reason"),
    [
        pytest.param(ask(""), grpc.StatusCode.INVALID_ARGUMENT, "EMPTY_PROMPT", id="empty prompt"),
        pytest.param(ask("x" * 64), grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED", id="long prompt"),
        pytest.param(ask("x" * 20_000), grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED", id="huge prompt"),
        pytest.param(ask(adapter_id="A\0"), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", id="NUL in the id"),
        pytest.param(
            ask(sampling=types_pb2.SamplingParams(temperature=float("nan"))),
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_FIELD",
            id="NaN",
        ),
        pytest.param(ask("a\0b"), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", id="NUL in the prompt"),
        pytest.param(
            ask(output=types_pb2.OutputParams(n=17)), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", id="17 outputs"
        ),
        pytest.param(
            gateway_pb2.GenerateRequest(token_ids=types_pb2.TokenIds(ids=[259])),
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_FIELD",
            id="an id out of the vocabulary",
        ),
        pytest.param(ask(adapter_id="ghost"), grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND", id="unknown adapter"),
        pytest.param(ask("x" * 5_000_000), grpc.StatusCode.RESOURCE_EXHAUSTED, "", id="5 MB"),
    ],
)
async def test_a_bad_request_goes_nowhere_and_the_next_is_served(
    fleet: Fleet, request_: gateway_pb2.GenerateRequest, code: grpc.StatusCode, reason: str
) -> None:
    error = await failure(fleet.api.GenerateStream(request_))
    assert (error.code(), reason_of(error)) == (code, reason)
    assert fleet.scheduler.received.empty()
    call = fleet.api.GenerateStream(ask())
    key = await fleet.running()
    await fleet.worker.say(tokens(key, 0, token_ids("ok"), finish=True))
    assert len(await read_all(call)) == 1


@pytest.mark.parametrize("method", ["Generate", "GenerateStream", "Tokenize", "ListModels"])
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\xff\xff\xff", id="malformed"),
        pytest.param(b"\x0a\x02\xc3\x28\x12\x02\xc3\x28", id="invalid UTF-8"),
    ],
)
async def test_bytes_that_are_no_request_are_refused(fleet: Fleet, method: str, data: bytes) -> None:
    kind = "unary_stream" if method == "GenerateStream" else "unary_unary"
    call = getattr(fleet.channel, kind)(f"/loraplex.v1.GatewayService/{method}")
    error = await failure(call(data))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "the request is not a valid protobuf message of this method"


async def test_before_it_is_ready_a_gateway_says_so_and_when_to_retry(start_fleet: StartFleet) -> None:
    fleet = await start_fleet(wait=False, adapter_store="127.0.0.1:1")
    for call in (
        fleet.api.Generate(ask()),
        fleet.api.GenerateStream(ask()),
        fleet.api.Tokenize(gateway_pb2.TokenizeRequest(text="a")),
        fleet.api.ListModels(gateway_pb2.ListModelsRequest()),
    ):
        error = await failure(call)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert retry_seconds_of(error) == 1.0


@pytest.mark.parametrize("servicer", [GatewayServicer, AdapterStoreProxy])
def test_every_method_of_the_proto_is_there(servicer: type) -> None:
    descriptors: dict[type, Any] = {
        GatewayServicer: gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"],
        AdapterStoreProxy: adapter_store_pb2.DESCRIPTOR.services_by_name["AdapterStoreService"],
    }
    assert {method.name for method in descriptors[servicer].methods} <= vars(servicer).keys()


async def test_calls_and_tokens_are_counted(fleet: Fleet) -> None:
    call = fleet.api.GenerateStream(ask("hi"))
    key = await fleet.running()
    await fleet.worker.say(tokens(key, 0, token_ids("ab")))
    await call.read()
    await fleet.worker.say(tokens(key, 0, token_ids("ab")), tokens(key, 2, token_ids("c"), finish=True))
    await call.read()
    assert await call.read() is grpc.aio.EOF
    await failure(fleet.api.Generate(ask(adapter_id="ghost")))
    shown = set(generate_latest(fleet.gateway.server.registry).decode().splitlines())
    tenant = 'model="tiny",tenant="default"'
    assert shown >= {
        'loraplex_gateway_requests_total{code="OK",method="GenerateStream",model="tiny",outcome="ok"} 1.0',
        'loraplex_gateway_requests_total{code="NOT_FOUND",method="Generate",model="tiny",outcome="client_error"} 1.0',
        'loraplex_gateway_inflight_requests{method="GenerateStream"} 0.0',
        'loraplex_gateway_time_to_first_token_seconds_count{model="tiny",residency="none"} 1.0',
        'loraplex_gateway_requests_by_tenant_total{outcome="ok",tenant="default"} 1.0',
        'loraplex_gateway_requests_by_adapter_total{adapter="_base",outcome="ok"} 1.0',
        'loraplex_gateway_rejections_total{reason="not_found"} 1.0',
        "loraplex_gateway_stream_buffer_bytes 0.0",
        'loraplex_gateway_inter_token_seconds_count{model="tiny"} 1.0',
        'loraplex_gateway_request_duration_seconds_count{model="tiny",outcome="ok"} 1.0',
        f"loraplex_gateway_prompt_tokens_total{{{tenant}}} 3.0",
        f"loraplex_gateway_generated_tokens_total{{{tenant}}} 3.0",
        "loraplex_gateway_duplicate_tokens_dropped_total 2.0",
        "loraplex_gateway_token_gaps_total 0.0",
    }


@pytest.mark.parametrize(
    ("timeout", "code", "outcome"), [(None, "CANCELLED", "cancelled"), (4.0, "DEADLINE_EXCEEDED", "shed")]
)
async def test_a_call_that_is_cut_off_is_counted_as_such(
    fleet: Fleet, timeout: float | None, code: str, outcome: str
) -> None:
    call = fleet.api.GenerateStream(ask(), timeout=timeout)
    await fleet.running()
    if timeout is None:
        call.cancel()
    await fleet.worker.aborts.get()
    await fleet.gateway.server.grpc.stop(None)
    shown = generate_latest(fleet.gateway.server.registry).decode()
    assert f'requests_total{{code="{code}",method="GenerateStream",model="tiny",outcome="{outcome}"}} 1.0' in shown
