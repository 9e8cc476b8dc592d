"""From deltas to messages: text and tokens side by side, stop strings, log-probabilities, echo, usage."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.answers import AnswerWriter, merge
from gateway.detokenizer import REPLACEMENT
from gateway.requests import Delta, OutputDelta
from gateway.tokenization import TextTokenizer
from loraplex.v1 import gateway_pb2, types_pb2
from tests.gateway.fakes import byte_tokenizer_files, token_ids

BYTES = TextTokenizer(byte_tokenizer_files())
STOP = types_pb2.FINISH_REASON_STOP


def writer(*, echo: str = "", stopping: Any = None, **output: Any) -> AnswerWriter:
    spec = types_pb2.RequestSpec(
        key=types_pb2.RequestKey(request_id="r"),
        prompt_token_ids=[1, 2],
        output=types_pb2.OutputParams(**{"n": 1, **output}),
        stopping=types_pb2.StoppingParams(**(stopping or {})),
    )
    return AnswerWriter(spec, BYTES, echo=echo)


def delta(offset: int, ids: list[int], *, finish: bool = False, index: int = 0) -> Delta:
    output = OutputDelta(index, offset, ids)
    if finish:
        output.finish_reason = types_pb2.FINISH_REASON_LENGTH
    return Delta([output])


def written(answers: AnswerWriter, *texts: str, finish: bool = True) -> list[gateway_pb2.GenerateResponse]:
    """One delta for each text, the last with the end of the output."""
    responses, offset = [], 0
    for position, text in enumerate(texts):
        ids = token_ids(text)
        responses.append(answers.write(delta(offset, ids, finish=finish and position == len(texts) - 1)))
        offset += len(ids)
    return [response for response in responses if response is not None]


def logprobs_of(ids: list[int]) -> list[types_pb2.PositionLogprobs]:
    chosen = [types_pb2.TokenLogprob(token_id=token_id, logprob=-0.5) for token_id in ids]
    return [types_pb2.PositionLogprobs(chosen=token, top=[token]) for token in chosen]


def test_a_message_without_whole_text_waits_for_the_next() -> None:
    answers = writer()
    smile = token_ids("😀")
    assert answers.write(delta(0, smile[:2])) is None
    response = answers.write(delta(2, smile[2:]))
    assert response is not None
    assert (response.outputs[0].text, response.outputs[0].token_offset) == ("😀", 0)
    after = answers.write(delta(4, token_ids("!")))
    assert after is not None
    assert after.outputs[0].token_offset == 4


def test_token_ids_do_not_wait_for_whole_text() -> None:
    answers = writer(return_token_ids=True)
    smile = token_ids("😀")
    response = answers.write(delta(0, smile[:2]))
    assert response is not None
    assert (response.outputs[0].text, list(response.outputs[0].token_ids)) == ("", smile[:2])


def test_the_last_message_has_what_was_held() -> None:
    answers = writer()
    assert answers.write(delta(0, token_ids("é")[:1])) is None
    response = answers.write(delta(1, [], finish=True))
    assert response is not None
    assert response.outputs[0].text == REPLACEMENT


@given(st.lists(st.text(max_size=5), min_size=1, max_size=5))
def test_merged_messages_are_the_whole(texts: list[str]) -> None:
    answers = writer(return_token_ids=True)
    ids = [token_ids(text) for text in texts]
    deltas = [delta(0, part) for part in ids] + [delta(0, [], finish=True)]
    written = [answers.write(part) for part in deltas]
    whole = merge([response for response in written if response is not None])
    assert whole.outputs[0].text == "".join(texts)
    assert whole.outputs[0].token_ids == [token for part in ids for token in part]
    assert whole.outputs[0].finish.reason == types_pb2.FINISH_REASON_LENGTH
    assert whole.HasField("usage")


def test_a_usage_that_the_worker_leaves_out_is_counted() -> None:
    (response,) = written(writer(), "abc")
    assert response.usage == types_pb2.Usage(prompt_tokens=2, completion_tokens=3)


def test_the_usage_of_the_worker_is_passed_on() -> None:
    end = delta(0, token_ids("a"), finish=True)
    end.usage = types_pb2.Usage(prompt_tokens=2, completion_tokens=1, cached_tokens=1, queue_seconds=0.5)
    response = writer().write(end)
    assert response is not None
    assert response.usage == end.usage


def test_a_stop_string_ends_the_text_before_it() -> None:
    answers = writer(stopping={"stop": ["END"]})
    whole = merge(written(answers, "ab", "cE", "ND", "x", finish=False))
    assert (whole.outputs[0].text, whole.outputs[0].finish) == ("abc", gateway_pb2.Finish(reason=STOP, stop="END"))
    assert (answers.ended, answers.stopped) == (True, [0])


def test_a_stop_string_is_kept_when_it_is_wanted() -> None:
    whole = merge(written(writer(stopping={"stop": ["END"], "include_stop": True}), "abENDx", finish=False))
    assert whole.outputs[0].text == "abEND"


def test_tokens_up_to_the_one_that_completes_a_stop_string_are_delivered() -> None:
    answers = writer(stopping={"stop": ["END"]}, return_token_ids=True, logprobs=0)
    ids = token_ids("abENDxyz")
    end = delta(0, ids)
    end.outputs[0].logprobs = logprobs_of(ids)
    response = answers.write(end)
    assert response is not None
    (output,) = response.outputs
    assert (output.text, list(output.token_ids), len(output.logprobs)) == ("ab", token_ids("abEND"), 5)
    assert response.usage.completion_tokens == 5


def test_the_usage_after_a_stop_string_counts_what_the_client_got() -> None:
    end = delta(0, token_ids("aENDxyz"), finish=True)
    end.usage = types_pb2.Usage(prompt_tokens=2, completion_tokens=7, cached_tokens=1)
    response = writer(stopping={"stop": ["END"]}).write(end)
    assert response is not None
    assert response.usage == types_pb2.Usage(prompt_tokens=2, completion_tokens=4, cached_tokens=1)


def test_what_could_have_become_a_stop_string_comes_at_the_end() -> None:
    first, last = written(writer(stopping={"stop": ["END"]}), "abEN", "")
    assert (first.outputs[0].text, last.outputs[0].text) == ("ab", "EN")
    assert last.outputs[0].finish.reason == types_pb2.FINISH_REASON_LENGTH


@pytest.mark.parametrize(("min_tokens", "text"), [(0, "a"), (4, "a"), (5, "aENDb"), (9, "aENDbEND")])
def test_a_stop_string_before_min_tokens_is_text(min_tokens: int, text: str) -> None:
    answers = writer(stopping={"stop": ["END"], "min_tokens": min_tokens})
    assert merge(written(answers, "aENDbEND")).outputs[0].text == text


@given(st.text("abE", max_size=20), st.lists(st.integers(1, 5), max_size=20))
def test_messages_of_any_size_stop_at_the_same_place(text: str, sizes: list[int]) -> None:
    pieces, rest = [], text
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    whole = merge(written(writer(stopping={"stop": ["ab", "bEb"]}), *pieces, rest))
    assert whole.outputs[0].text == merge(written(writer(stopping={"stop": ["ab", "bEb"]}), text)).outputs[0].text


def test_one_output_may_stop_while_another_goes_on() -> None:
    answers = writer(n=2, stopping={"stop": ["."]})
    first = answers.write(Delta([OutputDelta(0, 0, token_ids("a.b")), OutputDelta(1, 0, token_ids("c"))]))
    assert first is not None
    assert [(output.text, output.HasField("finish")) for output in first.outputs] == [("a", True), ("c", False)]
    assert not answers.ended
    last = answers.write(delta(1, token_ids("d"), finish=True, index=1))
    assert last is not None
    assert last.usage.completion_tokens == 4


def test_outputs_are_merged_by_index() -> None:
    answers = writer(n=2)
    responses = [
        answers.write(Delta([OutputDelta(1, 0, token_ids("b")), OutputDelta(0, 0, token_ids("a"))])),
        answers.write(delta(1, token_ids("B"), finish=True, index=1)),
        answers.write(delta(1, token_ids("A"), finish=True)),
    ]
    whole = merge([response for response in responses if response is not None])
    assert [(output.index, output.text) for output in whole.outputs] == [(0, "aA"), (1, "bB")]


def test_log_probabilities_stay_beside_their_tokens() -> None:
    answers = writer(logprobs=1)
    smile = token_ids("😀")
    offsets, told = [], []
    for offset, ids in enumerate([[token] for token in smile]):
        part = delta(offset, ids, finish=offset == 3)
        part.outputs[0].logprobs = logprobs_of(ids)
        response = answers.write(part)
        assert response is not None
        offsets.append(response.outputs[0].token_offset)
        told += [position.chosen.token_id for position in response.outputs[0].logprobs]
    assert (offsets, told) == ([0, 1, 2, 3], smile)


def test_tokens_of_log_probabilities_have_their_text() -> None:
    part = delta(0, token_ids("a"), finish=True)
    part.outputs[0].logprobs = logprobs_of(token_ids("a"))
    response = writer(logprobs=1).write(part)
    assert response is not None
    (position,) = response.outputs[0].logprobs
    assert (position.chosen.text, position.top[0].text) == ("a", "a")


def test_log_probabilities_of_the_prompt_come_at_once() -> None:
    answers = writer(prompt_logprobs=1)
    told = [types_pb2.PositionLogprobs(), *logprobs_of(token_ids("b"))]
    response = answers.write(Delta([], prompt_logprobs=told))
    assert response is not None
    assert [position.chosen.text for position in response.prompt_logprobs] == ["", "b"]
    assert response.request_id == "r"


def test_an_echo_is_in_front_of_every_output_once() -> None:
    answers = writer(n=2, echo="say ")
    responses = [
        answers.write(Delta([OutputDelta(0, 0, token_ids("a")), OutputDelta(1, 0, token_ids("b"))])),
        answers.write(delta(1, token_ids("A"), finish=True)),
        answers.write(delta(1, token_ids("B"), finish=True, index=1)),
    ]
    whole = merge([response for response in responses if response is not None])
    assert [output.text for output in whole.outputs] == ["say aA", "say bB"]


def test_a_stop_string_in_the_echo_stops_nothing() -> None:
    whole = merge(written(writer(echo="END ", stopping={"stop": ["END"]}), "a"))
    assert whole.outputs[0].text == "END a"
