"""Why and when an output ends, and what its last message carries."""

import json
import shutil
from pathlib import Path

import pytest

from loraplex.v1 import types_pb2
from tests.gpu_worker.engine_driver import EngineDriver
from tests.gpu_worker.tiny_model import CONTEXT

pytestmark = pytest.mark.usefixtures("step_mode")

PROMPT = list(range(2, 12))
STOP, LENGTH = types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH


@pytest.fixture
def driver(tiny_checkpoint: Path) -> EngineDriver:
    return EngineDriver(tiny_checkpoint)


@pytest.fixture(scope="module")
def greedy(tiny_checkpoint: Path) -> list[int]:
    return EngineDriver(tiny_checkpoint).generate("s", PROMPT, max_tokens=24)


@pytest.fixture(scope="module")
def with_eos(tiny_checkpoint: Path, greedy: list[int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, whose generation config ends an answer with its 5th token."""
    checkpoint = tmp_path_factory.mktemp("eos") / "model"
    shutil.copytree(tiny_checkpoint, checkpoint)
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [63, greedy[4]]}))
    return checkpoint


def test_max_tokens_end_an_output(driver: EngineDriver, greedy: list[int]) -> None:
    assert driver.generate("s", PROMPT, max_tokens=5) == greedy[:5]
    assert driver.ended["s"].finish_reason == LENGTH


def test_the_end_of_the_context_ends_an_output(driver: EngineDriver) -> None:
    driver.generate("s", list(range(60)), max_tokens=100)
    assert (60 + len(driver.tokens["s"]), driver.ended["s"].finish_reason) == (CONTEXT, LENGTH)


def test_a_stop_token_ends_an_output_and_is_its_last(driver: EngineDriver, greedy: list[int]) -> None:
    assert driver.generate("s", PROMPT, max_tokens=24, stop_token_ids=[greedy[3]]) == greedy[:4]
    assert driver.ended["s"].finish_reason == STOP
    assert driver.ended["s"].matched_stop_token_id == greedy[3]


def test_an_end_of_sequence_token_ends_an_output(with_eos: Path, greedy: list[int]) -> None:
    driver = EngineDriver(with_eos)
    assert driver.generate("s", PROMPT, max_tokens=24, ignore_eos=False) == greedy[:5]
    assert driver.ended["s"].finish_reason == STOP


def test_an_ignored_end_of_sequence_token_ends_nothing(with_eos: Path, greedy: list[int]) -> None:
    driver = EngineDriver(with_eos)
    assert driver.generate("s", PROMPT, max_tokens=24, ignore_eos=True) == greedy


def test_a_stop_token_still_ends_an_output_that_ignores_the_end_of_sequence(with_eos: Path, greedy: list[int]) -> None:
    driver = EngineDriver(with_eos)
    driver.generate("s", PROMPT, max_tokens=24, ignore_eos=True, stop_token_ids=[greedy[6]])
    assert driver.ended["s"].matched_stop_token_id == greedy[6]


def test_no_stop_token_is_drawn_before_min_tokens(driver: EngineDriver, greedy: list[int]) -> None:
    stops = {greedy[0], greedy[1]}
    tokens = driver.generate("s", PROMPT, max_tokens=24, min_tokens=3, stop_token_ids=sorted(stops))
    assert not stops & set(tokens[:3])


def test_the_last_message_says_what_the_request_cost(driver: EngineDriver) -> None:
    driver.generate("s", PROMPT, max_tokens=5)
    usage = driver.ended["s"].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(PROMPT), 5)
    assert min(usage.queue_seconds, usage.load_seconds, usage.prefill_seconds, usage.decode_seconds) >= 0


def test_the_last_token_and_the_reason_ride_together(driver: EngineDriver, greedy: list[int]) -> None:
    driver.generate("s", PROMPT, max_tokens=5)
    assert list(driver.ended["s"].token_ids) == [greedy[4]]


def test_tokens_are_numbered_without_gaps(driver: EngineDriver) -> None:
    driver.generate("s", PROMPT, max_tokens=4)
    assert [message.token_offset for message in driver.messages] == [0, 1, 2, 3]


def test_a_resumed_attempt_goes_on_behind_what_was_delivered(driver: EngineDriver, greedy: list[int]) -> None:
    tokens = driver.generate("s", PROMPT, max_tokens=12, attempt=1, delivered=greedy[:7])
    assert tokens == greedy[7:12]


def test_a_resumed_attempt_numbers_its_tokens_on(driver: EngineDriver, greedy: list[int]) -> None:
    driver.generate("s", PROMPT, max_tokens=12, attempt=1, delivered=greedy[:7])
    assert driver.messages[0].token_offset == 7


def test_a_resumed_attempt_draws_as_the_first_would_have(tiny_checkpoint: Path, driver: EngineDriver) -> None:
    whole = EngineDriver(tiny_checkpoint).generate("s", PROMPT, max_tokens=12, temperature=0.9, seed=3)
    rest = driver.generate("s", PROMPT, max_tokens=12, temperature=0.9, seed=3, delivered=whole[:5])
    assert rest == whole[5:]
