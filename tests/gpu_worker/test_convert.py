"""What an offer makes of a request on its worker."""

import pytest

from gpu_worker.convert import to_sequences
from loraplex.v1 import scheduler_pb2, types_pb2


def offered(**fields: object) -> bool:
    """Whether tokens of such a request may go to its gateway together."""
    request = types_pb2.RequestSpec(key=types_pb2.RequestKey(request_id="r", tenant="t"), prompt_token_ids=[3, 4])
    request.MergeFrom(types_pb2.RequestSpec(**fields))  # type: ignore[arg-type]  # each case has the types of its fields
    (sequence,) = to_sequences(scheduler_pb2.Offer(request=request), [], max_context_tokens=64)
    return sequence.whole


def test_tokens_may_go_together_when_the_client_waits_for_the_whole_answer() -> None:
    assert offered(whole=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"whole": False},
        {"whole": True, "stopping": types_pb2.StoppingParams(stop=["."])},
        {"whole": True, "output": types_pb2.OutputParams(logprobs=0)},
    ],
    ids=["read-as-they-come", "a-stop-string-may-end-it", "log-probabilities"],
)
def test_tokens_go_one_by_one_when_somebody_needs_each(fields: dict[str, object]) -> None:
    assert not offered(**fields)
