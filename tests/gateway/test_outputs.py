"""Stop strings, several outputs, log-probabilities, echo and chats through a real gateway."""

import asyncio

import grpc
import pytest

from loraplex.v1 import adapter_store_pb2, gateway_pb2, scheduler_pb2, types_pb2
from tests.gateway.conftest import Fleet, StartFleet, ask, failure, read_all, reason_of
from tests.gateway.fakes import FakeWorker, adapter, byte_tokenizer_files, token_ids, tokens

STOP_AT_END = types_pb2.StoppingParams(stop=["END"])
STOP = types_pb2.FINISH_REASON_STOP


async def test_every_field_reaches_the_worker_with_its_defaults(fleet: Fleet) -> None:
    sampling = types_pb2.SamplingParams(
        top_p=0.5, top_k=7, min_p=0.25, seed=3, presence_penalty=1, frequency_penalty=-1, logit_bias={5: -100.0}
    )
    stopping = types_pb2.StoppingParams(
        max_tokens=9, min_tokens=2, stop=["x"], stop_token_ids=[4], ignore_eos=True, include_stop=True
    )
    output = types_pb2.OutputParams(n=3, logprobs=2, prompt_logprobs=1, return_token_ids=True, echo=True)
    scheduling = types_pb2.SchedulingParams(priority=-1, ttft_slo_seconds=0.5)
    call = fleet.api.GenerateStream(ask(sampling=sampling, stopping=stopping, output=output, scheduling=scheduling))
    spec = await fleet.scheduler.submitted()
    sampling.temperature = sampling.repetition_penalty = 1.0
    assert (spec.sampling, spec.stopping) == (sampling, stopping)
    assert (spec.output, spec.scheduling) == (output, scheduling)
    call.cancel()


async def test_a_stop_string_ends_the_stream_and_frees_the_worker(fleet: Fleet) -> None:
    call = fleet.api.GenerateStream(ask(stopping=STOP_AT_END))
    key = await fleet.running()
    await fleet.worker.say(tokens(key, 0, token_ids("abE")))
    first = await call.read()
    assert isinstance(first, gateway_pb2.GenerateResponse)
    assert first.outputs[0].text == "ab"
    await fleet.worker.say(tokens(key, 3, token_ids("NDcd")))
    (last,) = await read_all(call)
    assert (last.outputs[0].text, last.outputs[0].finish) == ("", gateway_pb2.Finish(reason=STOP, stop="END"))
    assert last.usage.completion_tokens == 5
    abort = await fleet.worker.aborts.get()
    expected = scheduler_pb2.Abort(key=key, output_indexes=[0], cause=scheduler_pb2.ABORT_CAUSE_STOP)
    assert abort == expected
    assert len(fleet.gateway.table) == 0


async def test_the_scheduler_hears_of_a_stop_string_from_the_worker(fleet: Fleet) -> None:
    call = fleet.api.GenerateStream(ask(stopping=STOP_AT_END))
    key = await fleet.running()
    await fleet.worker.say(tokens(key, 0, token_ids("END")))
    await read_all(call)
    after = fleet.api.GenerateStream(ask())
    # The next message at the scheduler is another request's, and no abort.
    await fleet.scheduler.submitted()
    after.cancel()


async def test_one_output_stops_and_the_others_go_on(fleet: Fleet) -> None:
    call = fleet.api.GenerateStream(ask(stopping=STOP_AT_END, output=types_pb2.OutputParams(n=2)))
    key = await fleet.running()
    await fleet.worker.say(tokens(key, 0, token_ids("aEND")), tokens(key, 0, token_ids("b"), output_index=1))
    first = await call.read()
    assert isinstance(first, gateway_pb2.GenerateResponse)
    assert list((await fleet.worker.aborts.get()).output_indexes) == [0]
    # What the worker sent before it heard of the end.
    await fleet.worker.say(tokens(key, 4, token_ids("zz")))
    usage = types_pb2.Usage(prompt_tokens=3, completion_tokens=9, cached_tokens=2)
    await fleet.worker.say(tokens(key, 1, token_ids("c"), output_index=1, finish=True, usage=usage))
    (last,) = await read_all(call)
    assert [(output.index, output.text) for output in last.outputs] == [(1, "c")]
    assert last.usage == types_pb2.Usage(prompt_tokens=3, completion_tokens=6, cached_tokens=2)


async def test_unary_has_all_outputs_whole(fleet: Fleet) -> None:
    call = asyncio.ensure_future(fleet.api.Generate(ask(output=types_pb2.OutputParams(n=2, logprobs=1))))
    key = await fleet.running()
    for position, token in enumerate(token_ids("ab")):
        logprobs = [types_pb2.PositionLogprobs(chosen=types_pb2.TokenLogprob(token_id=token, logprob=-1))]
        await fleet.worker.say(
            *(
                tokens(key, position, [token], output_index=index, finish=position == 1, logprobs=logprobs)
                for index in range(2)
            )
        )
    whole = await call
    assert [output.text for output in whole.outputs] == ["ab", "ab"]
    assert [[position.chosen.text for position in output.logprobs] for output in whole.outputs] == [["a", "b"]] * 2
    assert [output.finish.reason for output in whole.outputs] == [types_pb2.FINISH_REASON_LENGTH] * 2


async def test_the_prompt_comes_back_with_its_log_probabilities(fleet: Fleet) -> None:
    call = fleet.api.GenerateStream(ask("hi", output=types_pb2.OutputParams(prompt_logprobs=0, echo=True)))
    key = await fleet.running()
    told = [types_pb2.PositionLogprobs()] + [
        types_pb2.PositionLogprobs(chosen=types_pb2.TokenLogprob(token_id=token)) for token in token_ids("hi")
    ]
    await fleet.worker.say(tokens(key, 0, [], prompt_logprobs=told))
    first = await call.read()
    assert isinstance(first, gateway_pb2.GenerateResponse)
    assert [position.chosen.text for position in first.prompt_logprobs] == ["", "h", "i"]
    await fleet.worker.say(tokens(key, 0, token_ids("!"), finish=True))
    (last,) = await read_all(call)
    assert last.outputs[0].text == "hi!"


async def test_token_ids_are_echoed_as_text(fleet: Fleet) -> None:
    prompt = types_pb2.TokenIds(ids=[1, *token_ids("hé")])
    request = gateway_pb2.GenerateRequest(token_ids=prompt, output=types_pb2.OutputParams(echo=True))
    call = fleet.api.GenerateStream(request)
    key = await fleet.running()
    await fleet.worker.say(tokens(key, 0, token_ids("!"), finish=True))
    (answer,) = await read_all(call)
    assert answer.outputs[0].text == "hé!"


def chat(*turns: tuple[str, str]) -> types_pb2.ChatPrompt:
    return types_pb2.ChatPrompt(messages=[types_pb2.ChatMessage(role=role, content=text) for role, text in turns])


@pytest.fixture
async def chatting(start_fleet: StartFleet) -> Fleet:
    """A fleet whose checkpoint has a chat template."""
    files = byte_tokenizer_files() | {"chat_template.jinja": b"<s>{{ messages[0].role }}:{{ messages[0].content }}"}
    return await start_fleet(worker=FakeWorker(files=files))


async def test_a_conversation_is_rendered_by_the_checkpoints_template(chatting: Fleet) -> None:
    call = chatting.api.GenerateStream(gateway_pb2.GenerateRequest(chat=chat(("user", "hi"))))
    assert (await chatting.scheduler.submitted()).prompt_token_ids == [1, *token_ids("user:hi")]
    call.cancel()


async def test_a_conversation_is_tokenised_as_for_generate(chatting: Fleet) -> None:
    response = await chatting.api.Tokenize(gateway_pb2.TokenizeRequest(chat=chat(("user", "hi"))))
    assert response.token_ids.ids == [1, *token_ids("user:hi")]


async def test_an_adapter_with_a_template_of_its_own_renders_with_that(chatting: Fleet) -> None:
    own = adapter("poet", sequence=9)
    own.chat_template = "poet {{ messages[0].content }}"
    chatting.store.announce(adapter_store_pb2.AdapterChange(sequence=9, put=own))
    chatting.store.adapters.append(own)
    request = gateway_pb2.TokenizeRequest(adapter_id="poet", chat=chat(("user", "hi")))
    assert (await chatting.api.Tokenize(request)).token_ids.ids == token_ids("poet hi")


async def test_a_template_that_fails_is_invalid_argument(start_fleet: StartFleet) -> None:
    files = byte_tokenizer_files() | {"chat_template.jinja": b"{{ raise_exception('no system message here') }}"}
    fleet = await start_fleet(worker=FakeWorker(files=files))
    error = await failure(fleet.api.Generate(gateway_pb2.GenerateRequest(chat=chat(("system", "x")))))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.INVALID_ARGUMENT, "CHAT_TEMPLATE_FAILED")
    assert "no system message here" in (error.details() or "")


async def test_a_conversation_without_a_template_is_a_failed_precondition(fleet: Fleet) -> None:
    error = await failure(fleet.api.Generate(gateway_pb2.GenerateRequest(chat=chat(("user", "x")))))
    assert (error.code(), reason_of(error)) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_CHAT_TEMPLATE")
