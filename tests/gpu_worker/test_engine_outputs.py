"""Several outputs of one prompt, and log-probabilities, from the real engine."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from loraplex.v1 import scheduler_pb2, types_pb2
from tests.gpu_worker.engine_driver import EngineDriver, key
from tests.gpu_worker.tiny_model import TinyAdapter

pytestmark = pytest.mark.usefixtures("step_mode")

PROMPT = list(range(2, 25))
FULL_PAGES = (len(PROMPT) - 1) // 4
# float32 through two layers; the acceptance asks for 1e-4
TOLERANCE = 1e-4


@pytest.fixture
def driver(tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]) -> EngineDriver:
    return EngineDriver(tiny_checkpoint, tiny_adapters)


def offer_outputs(driver: EngineDriver, n: int, adapter: str = "rank-3", max_tokens: int = 8, seed: int = 7) -> None:
    output = types_pb2.OutputParams(n=n)
    driver.offer("r", PROMPT, adapter, temperature=1.0, seed=seed, max_tokens=max_tokens, output=output)


def outputs(driver: EngineDriver, n: int) -> list[list[int]]:
    return [driver.tokens["r" if index == 0 else f"r/{index}"] for index in range(n)]


def test_each_output_has_its_own_draws(driver: EngineDriver) -> None:
    offer_outputs(driver, 4)
    driver.run()
    assert len({tuple(tokens) for tokens in outputs(driver, 4)}) == 4


def test_the_first_output_is_that_of_a_request_for_one(driver: EngineDriver) -> None:
    offer_outputs(driver, 3)
    driver.run()
    alone = driver.generate("one", PROMPT, "rank-3", temperature=1.0, seed=7)
    assert outputs(driver, 3)[0] == alone


def test_outputs_share_the_full_pages_of_the_prompt(driver: EngineDriver) -> None:
    offer_outputs(driver, 4)
    while driver.report.running_sequences < 4:
        driver.step()
    unshared = 1 + (len(PROMPT) - 4 * FULL_PAGES + 8) // 4
    assert driver.memory.kv_pages <= FULL_PAGES + 4 * unshared < 4 * FULL_PAGES


def test_sharing_changes_no_token(
    driver: EngineDriver, tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]
) -> None:
    offer_outputs(driver, 4)
    driver.run()
    # One at a time: when the next output starts, the first has ended and its pages are gone.
    one_by_one = EngineDriver(tiny_checkpoint, tiny_adapters, max_sequences=1)
    offer_outputs(one_by_one, 4)
    one_by_one.run()
    assert outputs(one_by_one, 4) == outputs(driver, 4)


def test_a_small_pool_preempts_outputs_and_changes_no_token(
    driver: EngineDriver, tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]
) -> None:
    offer_outputs(driver, 6, max_tokens=24)
    driver.run()
    small = EngineDriver(tiny_checkpoint, tiny_adapters, num_pages=24)
    offer_outputs(small, 6, max_tokens=24)
    small.run()
    assert small.preemptions > 0
    assert outputs(small, 6) == outputs(driver, 6)
    assert small.memory.kv_pages == 0


def test_usage_comes_with_the_first_token_and_with_the_last_output_and_counts_all(driver: EngineDriver) -> None:
    offer_outputs(driver, 3)
    driver.run()
    usages = [message.usage for message in driver.messages if message.HasField("usage")]
    assert [(usage.prompt_tokens, usage.completion_tokens) for usage in usages] == [(len(PROMPT), 1), (len(PROMPT), 24)]


def test_the_scheduler_hears_of_one_request(driver: EngineDriver) -> None:
    offer_outputs(driver, 3)
    driver.run()
    states = [progress.state for progress in driver.progress["r"]]
    assert states.count(scheduler_pb2.REQUEST_STATE_FINISHED) == 1
    assert states[-1] == scheduler_pb2.REQUEST_STATE_FINISHED


def test_one_output_can_be_ended_and_the_others_go_on(driver: EngineDriver) -> None:
    offer_outputs(driver, 3, max_tokens=20)
    while driver.report.running_sequences < 3:
        driver.step()
    driver.send(abort=scheduler_pb2.Abort(key=key("r"), output_indexes=[1], cause=scheduler_pb2.ABORT_CAUSE_STOP))
    driver.run()
    lengths = [len(tokens) for tokens in outputs(driver, 3)]
    assert lengths[0] == lengths[2] == 20
    assert lengths[1] < 20
    assert driver.ended["r/1"].finish_reason == types_pb2.FINISH_REASON_STOP


def test_ending_the_first_output_leaves_shared_pages_to_the_others(driver: EngineDriver) -> None:
    offer_outputs(driver, 3, max_tokens=20)
    driver.run()
    expected = outputs(driver, 3)
    again = "again"
    driver.offer(again, PROMPT, "rank-3", temperature=1.0, seed=7, max_tokens=20, output=types_pb2.OutputParams(n=3))
    while driver.report.running_sequences < 3:
        driver.step()
    driver.send(abort=scheduler_pb2.Abort(key=key(again), output_indexes=[0]))
    driver.run()
    assert [driver.tokens[f"{again}/1"], driver.tokens[f"{again}/2"]] == expected[1:]
    assert driver.memory.kv_pages == 0


@pytest.mark.parametrize("max_step_tokens", [128, 16])
def test_prompt_logprobs_are_the_oracles(tiny_checkpoint: Path, max_step_tokens: int) -> None:
    driver = EngineDriver(tiny_checkpoint, max_step_tokens=max_step_tokens, max_sequences=4)
    driver.offer("s", PROMPT, output=types_pb2.OutputParams(prompt_logprobs=2, logprobs=0))
    driver.run()
    (message,) = (message for message in driver.messages if message.prompt_logprobs)
    positions = message.prompt_logprobs
    assert not positions[0].HasField("chosen")
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    with torch.inference_mode():
        expected = torch.log_softmax(model(torch.tensor([PROMPT])).logits[0], dim=-1)
    assert [position.chosen.token_id for position in positions[1:]] == PROMPT[1:]
    for index, position in enumerate(positions[1:]):
        assert position.chosen.logprob == pytest.approx(float(expected[index, PROMPT[index + 1]]), abs=TOLERANCE)
        best = expected[index].topk(2)
        assert [top.token_id for top in position.top] == best.indices.tolist()
        assert [top.logprob for top in position.top] == pytest.approx(best.values.tolist(), abs=TOLERANCE)


def test_prompt_logprobs_survive_a_preemption(tiny_checkpoint: Path) -> None:
    driver = EngineDriver(tiny_checkpoint, max_step_tokens=8, max_sequences=4)
    driver.offer("s", PROMPT, output=types_pb2.OutputParams(prompt_logprobs=0))
    driver.step()
    driver.step()
    driver.command(preempt=scheduler_pb2.Preempt(key=key("s")))
    driver.run()
    (message,) = (message for message in driver.messages if message.prompt_logprobs)
    assert [position.chosen.token_id for position in message.prompt_logprobs[1:]] == PROMPT[1:]


def test_logprobs_of_generated_tokens_are_the_oracles(tiny_checkpoint: Path) -> None:
    driver = EngineDriver(tiny_checkpoint)
    driver.offer("s", PROMPT, output=types_pb2.OutputParams(logprobs=3))
    driver.run()
    tokens = driver.tokens["s"]
    positions = [position for message in driver.messages for position in message.logprobs]
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT + tokens[:-1]])).logits[0, len(PROMPT) - 1 :]
    expected = torch.log_softmax(logits, dim=-1)
    assert [position.chosen.token_id for position in positions] == tokens
    chosen = [float(expected[row, token]) for row, token in enumerate(tokens)]
    assert [position.chosen.logprob for position in positions] == pytest.approx(chosen, abs=TOLERANCE)
    assert all(len(position.top) == 3 for position in positions)


def test_nothing_is_described_unasked(driver: EngineDriver) -> None:
    driver.generate("s", PROMPT)
    assert not any(message.logprobs or message.prompt_logprobs for message in driver.messages)
