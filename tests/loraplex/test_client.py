"""The blocking client against a scripted gateway."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.rpc import code_pb2

from loraplex import Client, LoraplexError
from loraplex.requests import UPLOAD_CHUNK_BYTES
from loraplex.results import FinishReason
from loraplex.v1 import adapter_store_pb2, gateway_pb2
from tests.loraplex import fakes
from tests.loraplex.fakes import KNOWN_ADAPTERS, FakeGateway


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


def sent_options(gateway: FakeGateway) -> gateway_pb2.GenerateRequest:
    (request,) = gateway.requests
    assert isinstance(request, gateway_pb2.GenerateRequest)
    return request


def test_generate_returns_the_whole_answer(client: Client) -> None:
    answer = client.generate("one two", request_id="mine")
    assert (answer.text, answer.finish_reason, answer.adapter_version) == ("ONE TWO", FinishReason.STOP, "digest")
    assert (answer.seed, answer.request_id) == (7, "mine")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2


def test_generate_returns_token_ids(client: Client) -> None:
    assert client.generate("one", return_token_ids=True).token_ids == (5, 6)


def test_a_text_prompt_is_sent_as_text(client: Client, gateway: FakeGateway) -> None:
    client.generate("one two", "alpha")
    assert sent_options(gateway) == gateway_pb2.GenerateRequest(adapter_id="alpha", text="one two")


def test_a_list_of_ids_is_sent_as_token_ids(client: Client, gateway: FakeGateway) -> None:
    client.generate([1, 2, 3])
    assert list(sent_options(gateway).token_ids.ids) == [1, 2, 3]


def test_an_empty_list_of_ids_is_not_an_absent_prompt(client: Client, gateway: FakeGateway) -> None:
    client.generate([])
    assert sent_options(gateway).WhichOneof("prompt") == "token_ids"


def test_options_reach_their_fields(client: Client, gateway: FakeGateway) -> None:
    client.generate(
        "x",
        adapter_version="abc",
        temperature=0.0,
        seed=9,
        logit_bias={4: -1.0},
        max_tokens=3,
        stop=["\n"],
        stop_token_ids=[2],
        ignore_eos=True,
        return_token_ids=True,
        priority=-1,
    )
    request = sent_options(gateway)
    assert request.adapter_version == "abc"
    assert (request.sampling.temperature, request.sampling.seed, dict(request.sampling.logit_bias)) == (0, 9, {4: -1.0})
    assert (request.stopping.max_tokens, list(request.stopping.stop)) == (3, ["\n"])
    assert (list(request.stopping.stop_token_ids), request.stopping.ignore_eos) == ([2], True)
    assert (request.output.return_token_ids, request.scheduling.priority) == (True, -1)


def test_an_option_that_is_given_as_zero_is_present(client: Client, gateway: FakeGateway) -> None:
    client.generate("x", temperature=0.0)
    assert sent_options(gateway).sampling.HasField("temperature")


def test_an_option_that_is_left_out_is_absent(client: Client, gateway: FakeGateway) -> None:
    client.generate("x")
    assert not sent_options(gateway).HasField("sampling")


@pytest.mark.parametrize("options", [{"max_tokens": -1}, {"max_tokens": "many"}, {"stop": 3}, {"temprature": 0.5}])
def test_an_option_that_does_not_fit_is_refused_by_name(client: Client, options: Any) -> None:
    with pytest.raises(LoraplexError, match=f"BAD_OPTION: {next(iter(options))}="):
        client.generate("x", **options)


def test_a_negative_token_id_is_refused(client: Client) -> None:
    with pytest.raises(LoraplexError, match="BAD_PROMPT"):
        client.generate([-1])


def test_stream_yields_deltas_in_order(client: Client) -> None:
    deltas = list(client.stream("one two three"))
    assert [(delta.text, delta.token_offset) for delta in deltas] == [("one", 0), ("two", 1), ("three", 2)]


def test_the_last_delta_has_finish_reason_and_usage(client: Client) -> None:
    *earlier, last = client.stream("one two")
    assert last.finish_reason is FinishReason.LENGTH
    assert last.usage is not None
    assert [(delta.finish_reason, delta.usage) for delta in earlier] == [(None, None)]


def test_closing_a_stream_cancels_the_request(client: Client, gateway: FakeGateway) -> None:
    gateway.holds_streams = True
    stream = client.stream("one two")
    next(stream)
    stream.close()
    assert gateway.stream_ended.wait(fakes.HOLD_SECONDS / 2)


def test_a_failed_call_has_reason_hint_and_request_id(client: Client, gateway: FakeGateway) -> None:
    gateway.failure = fakes.status(code_pb2.RESOURCE_EXHAUSTED, "QUEUE_FULL", "8 wait", retry_after_seconds=1.5)
    with pytest.raises(LoraplexError) as caught:
        client.generate("x", request_id="mine")
    error = caught.value
    assert (error.reason, error.message, error.retry_after_seconds) == ("QUEUE_FULL", "8 wait", 1.5)
    assert (error.request_id, error.metadata) == ("mine", {"limit": "8"})


def test_a_request_id_is_made_up_and_sent(client: Client, gateway: FakeGateway) -> None:
    gateway.failure = fakes.status(code_pb2.NOT_FOUND, "ADAPTER_NOT_FOUND", "no such adapter")
    with pytest.raises(LoraplexError) as caught:
        client.generate("x")
    assert gateway.request_ids == [caught.value.request_id] != [""]


def test_a_stream_that_breaks_raises_after_its_deltas(client: Client, gateway: FakeGateway) -> None:
    gateway.failure = fakes.status(code_pb2.UNAVAILABLE, "STREAM_BROKEN", "the worker is gone")
    gateway.words_before_failure = 2
    stream = client.stream("one two three")
    assert [next(stream).text, next(stream).text] == ["one", "two"]
    with pytest.raises(LoraplexError, match="STREAM_BROKEN"):
        next(stream)


def test_a_call_that_takes_too_long_is_deadline_exceeded(client: Client, gateway: FakeGateway) -> None:
    gateway.holds_streams = True
    with pytest.raises(LoraplexError, match="DEADLINE_EXCEEDED"):
        list(client.stream("one two", timeout=0.2))


def test_nobody_there_is_unreachable() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(LoraplexError, match=r"UNREACHABLE.*127\.0\.0\.1:1"):
        client.models()


def test_models_follows_the_pages(client: Client) -> None:
    assert [model.adapter_id for model in client.models()] == ["", *KNOWN_ADAPTERS]


def test_list_follows_the_pages(client: Client) -> None:
    assert [adapter.adapter_id for adapter in client.adapters.list()] == list(KNOWN_ADAPTERS)


def test_delete_returns_the_version(client: Client, gateway: FakeGateway) -> None:
    assert client.adapters.delete("alpha") == "digest"
    assert [request.adapter_id for request in gateway.requests] == ["alpha"]


def test_push_sends_a_header_then_the_files(client: Client, gateway: FakeGateway, adapter_folder: Path) -> None:
    result = client.adapters.push("alpha", adapter_folder, replace=True)
    header, *chunks = gateway.requests[0]
    assert (header.header.adapter_id, header.header.replace) == ("alpha", True)
    assert [(message.chunk.file, message.chunk.data) for message in chunks] == [
        (adapter_store_pb2.ADAPTER_FILE_CONFIG, b"{}"),
        (adapter_store_pb2.ADAPTER_FILE_WEIGHTS, b"w" * 10),
    ]
    assert (result.adapter.adapter_version, result.created, result.warnings) == ("digest", True, ("a warning",))


def test_push_cuts_a_file_into_chunks(client: Client, gateway: FakeGateway, adapter_folder: Path) -> None:
    weights = bytes(range(256)) * (UPLOAD_CHUNK_BYTES // 256) * 2 + b"tail"
    (adapter_folder / "adapter_model.safetensors").write_bytes(weights)
    client.adapters.push("alpha", adapter_folder)
    chunks = [message.chunk.data for message in gateway.requests[0][2:]]
    assert [len(chunk) for chunk in chunks] == [UPLOAD_CHUNK_BYTES, UPLOAD_CHUNK_BYTES, 4]
    assert b"".join(chunks) == weights


def test_push_sends_a_chat_template_too(client: Client, gateway: FakeGateway, adapter_folder: Path) -> None:
    (adapter_folder / "chat_template.jinja").write_bytes(b"{{ messages }}")
    client.adapters.push("alpha", adapter_folder)
    last = gateway.requests[0][-1].chunk
    assert (last.file, last.data) == (adapter_store_pb2.ADAPTER_FILE_CHAT_TEMPLATE, b"{{ messages }}")


def test_push_tells_its_progress(client: Client, adapter_folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    client.adapters.push("alpha", adapter_folder, on_progress=lambda sent, total: seen.append((sent, total)))
    assert seen == [(2, 12), (12, 12)]


def test_push_names_a_file_that_is_missing(client: Client, adapter_folder: Path) -> None:
    (adapter_folder / "adapter_model.safetensors").unlink()
    with pytest.raises(LoraplexError, match=r"ADAPTER_FILE_MISSING.*has no adapter_model\.safetensors"):
        client.adapters.push("alpha", adapter_folder)


def test_push_explains_that_pickles_are_not_taken(client: Client, adapter_folder: Path) -> None:
    (adapter_folder / "adapter_model.safetensors").rename(adapter_folder / "adapter_model.bin")
    with pytest.raises(LoraplexError, match="save the adapter as safetensors"):
        client.adapters.push("alpha", adapter_folder)


def test_push_names_a_folder_that_is_missing(client: Client, tmp_path: Path) -> None:
    with pytest.raises(LoraplexError, match="ADAPTER_FOLDER_MISSING"):
        client.adapters.push("alpha", tmp_path / "nowhere")


def test_the_stubs_do_not_import_the_client() -> None:
    program = "import sys, loraplex.v1; print([name for name in sys.modules if name.startswith('loraplex.')])"
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert loaded.strip() == "['loraplex.v1']"
