"""From token deltas to the messages a client reads."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from gateway.detokenizer import Decoder, Detokenizer
from gateway.requests import Delta, OutputDelta
from gateway.stop_strings import StopMatcher
from loraplex.v1 import gateway_pb2, types_pb2


class TokenTexts(Decoder, Protocol):
    """The half of a tokenizer that answers need."""

    def token_text(self, token_id: int) -> str: ...


class _OutputWriter:
    """One output: its text so far, and the tokens that no message has shown yet."""

    def __init__(
        self,
        index: int,
        tokenizer: TokenTexts,
        spec: types_pb2.RequestSpec,
        *,
        context: Sequence[int],
        echo: str,
    ) -> None:
        self._index = index
        self._tokenizer = tokenizer
        self._output = spec.output
        self._min_tokens = spec.stopping.min_tokens
        self._detokenizer = Detokenizer(tokenizer, context)
        self._stops = StopMatcher(spec.stopping.stop, include_stop=spec.stopping.include_stop)
        # The prompt, until it has been written.
        self._echo = echo
        # Tokens of this output that belong to the answer, and those of them in messages already written.
        self.num_tokens = 0
        self._written_tokens = 0
        self._pending_ids: list[int] = []
        self._pending_logprobs: list[types_pb2.PositionLogprobs] = []
        self.ended = False

    @property
    def stopped(self) -> bool:
        """A stop string ended it, which the worker does not know."""
        return self._stops.matched is not None

    def write(self, delta: OutputDelta) -> gateway_pb2.Output | None:
        """The delta as a message; None while there is nothing to show."""
        text = self._take_in(delta)
        self.ended = delta.finished or self.stopped
        shows_tokens = self._output.return_token_ids or self._output.HasField("logprobs")
        if not (text or self.ended or (shows_tokens and self._pending_ids)):
            return None
        output = gateway_pb2.Output(index=self._index, text=self._echo + text, token_offset=self._written_tokens)
        if self._output.return_token_ids:
            output.token_ids.extend(self._pending_ids)
        output.logprobs.extend(self._pending_logprobs)
        name_tokens(output.logprobs, self._tokenizer)
        self._finish(output, delta)
        self._echo, self._written_tokens = "", self.num_tokens
        self._pending_ids.clear()
        self._pending_logprobs.clear()
        return output

    def _take_in(self, delta: OutputDelta) -> str:
        """The text that can be shown now. Tokens after the one that completes a stop string are dropped."""
        pieces: list[str] = []
        for token_id in delta.token_ids:
            self.num_tokens += 1
            self._pending_ids.append(token_id)
            text = self._detokenizer.push([token_id])
            pieces.append(self._stops.push(text, honoured=self.num_tokens >= self._min_tokens))
            if self.stopped:
                break
        self._pending_logprobs.extend(delta.logprobs[: self.num_tokens - delta.token_offset])
        if delta.finished and not self.stopped:
            pieces.append(self._stops.push(self._detokenizer.flush(), honoured=self.num_tokens >= self._min_tokens))
            pieces.append(self._stops.flush())
        return "".join(pieces)

    def _finish(self, output: gateway_pb2.Output, delta: OutputDelta) -> None:
        if self._stops.matched is not None:
            output.finish.reason = types_pb2.FINISH_REASON_STOP
            output.finish.stop = self._stops.matched
        elif delta.finished:
            output.finish.reason = delta.finish_reason
            if delta.matched_stop_token_id is not None:
                output.finish.stop_token_id = delta.matched_stop_token_id


class AnswerWriter:
    """Writes the messages of one request."""

    def __init__(
        self, spec: types_pb2.RequestSpec, tokenizer: TokenTexts, *, context: Sequence[int] = (), echo: str = ""
    ) -> None:
        """`context` are the tokens that the text of the outputs continues; `echo` goes in front of each."""
        self._spec = spec
        self._tokenizer = tokenizer
        self._outputs = [
            _OutputWriter(index, tokenizer, spec, context=context, echo=echo) for index in range(max(1, spec.output.n))
        ]
        self._first = True

    @property
    def ended(self) -> bool:
        """Every output has been written to its end."""
        return all(output.ended for output in self._outputs)

    @property
    def stopped(self) -> list[int]:
        """Outputs that a stop string ended."""
        return [index for index, output in enumerate(self._outputs) if output.stopped]

    def write(self, delta: Delta) -> gateway_pb2.GenerateResponse | None:
        """None while no text is whole. The first message says what was really used, the last one what it cost."""
        open_outputs = [output for output in delta.outputs if not self._outputs[output.index].ended]
        written = [self._outputs[output.index].write(output) for output in open_outputs]
        response = gateway_pb2.GenerateResponse(outputs=[output for output in written if output is not None])
        response.prompt_logprobs.extend(delta.prompt_logprobs)
        name_tokens(response.prompt_logprobs, self._tokenizer)
        if self.ended:
            response.usage.CopyFrom(self._usage(delta.usage))
        elif not (response.outputs or response.prompt_logprobs):
            return None
        if self._first:
            self._first = False
            response.request_id = self._spec.key.request_id
            response.adapter_version = self._spec.adapter_version
            response.seed = self._spec.sampling.seed
        return response

    def _usage(self, known: types_pb2.Usage | None) -> types_pb2.Usage:
        """What the worker counted, unless the answer is shorter than what it generated."""
        usage = types_pb2.Usage()
        if known is not None:
            usage.CopyFrom(known)
        if known is None or self.stopped:
            usage.prompt_tokens = len(self._spec.prompt_token_ids)
            usage.completion_tokens = sum(output.num_tokens for output in self._outputs)
        return usage


def name_tokens(positions: Iterable[types_pb2.PositionLogprobs], tokenizer: TokenTexts) -> None:
    """Writes the text of every token beside its id."""
    for position in positions:
        if position.HasField("chosen"):
            position.chosen.text = tokenizer.token_text(position.chosen.token_id)
        for candidate in position.top:
            candidate.text = tokenizer.token_text(candidate.token_id)


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
