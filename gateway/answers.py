"""From token deltas to the messages a client reads."""

from collections.abc import Iterable

from gateway.requests import Delta, OutputDelta
from gateway.tokenization import Decoder, Detokenizer
from loraplex.v1 import gateway_pb2, types_pb2


class _OutputText:
    """One output: its detokeniser and the tokens whose text is not whole yet."""

    def __init__(self, index: int, decoder: Decoder) -> None:
        self._index = index
        self._detokenizer = Detokenizer(decoder)
        # Tokens of this output in messages already written.
        self._written_tokens = 0
        self._pending: list[int] = []

    def write(self, delta: OutputDelta, *, with_token_ids: bool) -> gateway_pb2.Output | None:
        """The delta as a message; None while there is nothing to show."""
        self._pending.extend(delta.token_ids)
        text = self._detokenizer.push(delta.token_ids)
        if delta.finished:
            text += self._detokenizer.flush()
        elif not text and not with_token_ids:
            return None
        output = gateway_pb2.Output(index=self._index, text=text, token_offset=self._written_tokens)
        if with_token_ids:
            output.token_ids.extend(self._pending)
        if delta.finished:
            output.finish.reason = delta.finish_reason
            if delta.matched_stop_token_id is not None:
                output.finish.stop_token_id = delta.matched_stop_token_id
        self._written_tokens += len(self._pending)
        self._pending.clear()
        return output


class AnswerWriter:
    """Writes the messages of one request."""

    def __init__(self, spec: types_pb2.RequestSpec, decoder: Decoder) -> None:
        self._spec = spec
        self._outputs = [_OutputText(index, decoder) for index in range(spec.output.n)]
        self._first = True

    def write(self, delta: Delta) -> gateway_pb2.GenerateResponse | None:
        """None while no text is whole. The first message says what was really used, the last one what it cost."""
        with_token_ids = self._spec.output.return_token_ids
        written = [self._outputs[output.index].write(output, with_token_ids=with_token_ids) for output in delta.outputs]
        response = gateway_pb2.GenerateResponse(outputs=[output for output in written if output is not None])
        if not response.outputs and delta.usage is None:
            return None
        if delta.usage is not None:
            response.usage.CopyFrom(delta.usage)
        if self._first:
            self._first = False
            response.request_id = self._spec.key.request_id
            response.adapter_version = self._spec.adapter_version
            response.seed = self._spec.sampling.seed
        return response


def merge(responses: Iterable[gateway_pb2.GenerateResponse]) -> gateway_pb2.GenerateResponse:
    """All messages of a stream as one with whole outputs, sorted by index."""
    whole = gateway_pb2.GenerateResponse()
    outputs: dict[int, gateway_pb2.Output] = {}
    texts: dict[int, list[str]] = {}
    for response in responses:
        for delta in response.outputs:
            output = outputs.setdefault(delta.index, gateway_pb2.Output(index=delta.index))
            texts.setdefault(delta.index, []).append(delta.text)
            output.token_ids.extend(delta.token_ids)
            output.logprobs.extend(delta.logprobs)
            if delta.HasField("finish"):
                output.finish.CopyFrom(delta.finish)
        del response.outputs[:]
        whole.MergeFrom(response)
    for index in sorted(outputs):
        outputs[index].text = "".join(texts[index])
        whole.outputs.append(outputs[index])
    return whole
