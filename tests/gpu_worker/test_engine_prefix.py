"""The real engine with prefix hits: what is reused, what never is, and that no token changes."""

from pathlib import Path

import pytest

from loraplex.v1 import scheduler_pb2, types_pb2
from tests.gpu_worker.engine_driver import EngineDriver, key
from tests.gpu_worker.tiny_model import TinyAdapter

pytestmark = pytest.mark.usefixtures("step_mode")

PAGE = 4
PROMPT = list(range(2, 25))
# The last prompt token is computed anew.
FULL = (len(PROMPT) - 1) // PAGE * PAGE


@pytest.fixture
def driver(tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]) -> EngineDriver:
    return EngineDriver(tiny_checkpoint, tiny_adapters)


def cached(driver: EngineDriver, name: str) -> int:
    return driver.ended[name].usage.cached_tokens


def test_a_second_identical_prompt_computes_what_is_not_in_full_pages(driver: EngineDriver) -> None:
    first, second = (driver.generate(name, PROMPT, "rank-3") for name in ("first", "second"))
    assert (cached(driver, "first"), cached(driver, "second")) == (0, FULL)
    assert first == second


def test_a_hit_is_not_computed(driver: EngineDriver) -> None:
    driver.generate("first", PROMPT)
    driver.stats.clear()
    driver.generate("second", PROMPT)
    assert driver.stats[0].prefill_tokens == len(PROMPT) - FULL


def test_a_prompt_of_whole_pages_computes_its_last_page(driver: EngineDriver) -> None:
    for name in ("first", "second"):
        driver.generate(name, PROMPT[: 4 * PAGE])
    assert cached(driver, "second") == 3 * PAGE


def test_the_first_message_tells_too(driver: EngineDriver) -> None:
    for name in ("first", "second"):
        driver.generate(name, PROMPT)
    first = next(message for message in driver.messages if message.key.request_id == "second")
    assert first.usage.cached_tokens == FULL


def test_the_next_turn_of_a_conversation_reuses_the_answer(driver: EngineDriver) -> None:
    answer = driver.generate("first", PROMPT, max_tokens=20)
    driver.generate("second", [*PROMPT, *answer, 5, 6, 7])
    # The last token drawn was never computed.
    assert cached(driver, "second") == (len(PROMPT) + 19) // PAGE * PAGE


def test_what_was_looked_up_and_what_was_found_is_counted(driver: EngineDriver) -> None:
    """Also where the adapter is still being loaded when the sequence is admitted."""
    for name in ("first", "second"):
        driver.generate(name, PROMPT, "rank-3")
    looked_up = sum(stats.prefix_query_tokens for stats in driver.stats)
    found = sum(stats.prefix_hit_tokens for stats in driver.stats)
    assert (looked_up, found) == (2 * len(PROMPT), FULL)


@pytest.mark.parametrize("adapter", ["", "rank-8"], ids=["base", "another"])
def test_another_adapter_shares_nothing(driver: EngineDriver, adapter: str) -> None:
    driver.generate("first", PROMPT, "rank-3")
    driver.generate("second", PROMPT, adapter)
    assert cached(driver, "second") == 0


def test_another_tenant_shares_nothing(driver: EngineDriver) -> None:
    driver.generate("first", PROMPT, tenant="one")
    driver.generate("second", PROMPT, tenant="two")
    assert cached(driver, "second") == 0


def test_tenants_with_one_salt_share(driver: EngineDriver) -> None:
    driver.generate("first", PROMPT, tenant="one", isolation_salt="group")
    driver.generate("second", PROMPT, tenant="two", isolation_salt="group")
    assert cached(driver, "second") == FULL


def test_one_tenant_with_two_salts_shares_nothing(driver: EngineDriver) -> None:
    driver.generate("first", PROMPT, isolation_salt="one")
    driver.generate("second", PROMPT, isolation_salt="two")
    assert cached(driver, "second") == 0


def test_a_hit_changes_no_token_whatever_its_length(
    driver: EngineDriver, tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]
) -> None:
    """Prompts that part after every number of pages, against an engine that never has a hit."""
    prompts = {f"s{split}": [*PROMPT[:split], *reversed(PROMPT[split:])] for split in range(0, len(PROMPT), 2)}
    for name, prompt in prompts.items():
        driver.offer(name, prompt, "rank-8", max_tokens=12)
        driver.run()
    hits = {name: cached(driver, name) for name in prompts}
    assert set(hits.values()) >= {0, PAGE, 2 * PAGE, 3 * PAGE, 4 * PAGE}
    cold = EngineDriver(tiny_checkpoint, tiny_adapters)
    for name, prompt in prompts.items():
        cold.generate(name, prompt, "rank-8", max_tokens=12, isolation_salt=name)
        assert cached(cold, name) == 0
    assert {name: driver.tokens[name] for name in prompts} == {name: cold.tokens[name] for name in prompts}


def test_hits_beside_running_owners_change_no_token(driver: EngineDriver) -> None:
    alone = driver.generate("alone", PROMPT, "rank-3", max_tokens=20, isolation_salt="alone")
    driver.offer("owner", PROMPT, "rank-3", max_tokens=20)
    for _ in range(3):
        driver.step()
    driver.offer("guest", PROMPT, "rank-3", max_tokens=20)
    driver.run()
    assert cached(driver, "guest") == FULL
    assert driver.tokens["owner"] == driver.tokens["guest"] == alone


def test_two_that_compute_the_same_at_once_change_no_token(driver: EngineDriver) -> None:
    for name in ("first", "second"):
        driver.offer(name, PROMPT, "rank-3", max_tokens=20)
    driver.run()
    assert driver.tokens["first"] == driver.tokens["second"]


def test_a_preempted_sequence_comes_back_to_its_pages(driver: EngineDriver) -> None:
    alone = driver.generate("alone", PROMPT, max_tokens=20, isolation_salt="alone")
    driver.offer("s", PROMPT, max_tokens=20)
    for _ in range(8):
        driver.step()
    driver.stats.clear()
    driver.command(preempt=scheduler_pb2.Preempt(key=key("s")))
    driver.run()
    # Seven tokens were drawn; the full pages of what was computed are still there.
    recomputed = driver.stats[0].prefill_tokens
    assert recomputed <= PAGE
    assert (driver.tokens["s"], cached(driver, "s")) == (alone, 0)


def test_outputs_share_the_prompt_and_the_first_counts(driver: EngineDriver) -> None:
    driver.offer("s", PROMPT, output=types_pb2.OutputParams(n=3))
    driver.run()
    computed = sum(stats.prefill_tokens for stats in driver.stats)
    usage = next(message.usage for message in reversed(driver.messages) if message.HasField("usage"))
    assert (computed, usage.cached_tokens) == (len(PROMPT) + 2 * (len(PROMPT) - FULL), 0)


def test_a_prompt_to_be_described_is_computed_whole(driver: EngineDriver) -> None:
    driver.generate("first", PROMPT)
    driver.stats.clear()
    driver.offer("second", PROMPT, output=types_pb2.OutputParams(prompt_logprobs=0))
    driver.run()
    (described,) = [message.prompt_logprobs for message in driver.messages if message.prompt_logprobs]
    assert (driver.stats[0].prefill_tokens, len(described)) == (len(PROMPT), len(PROMPT))


def test_it_leaves_pages_for_others(driver: EngineDriver) -> None:
    driver.offer("first", PROMPT, output=types_pb2.OutputParams(prompt_logprobs=0))
    driver.run()
    driver.generate("second", PROMPT)
    assert cached(driver, "second") == FULL


def test_delivered_tokens_are_found_and_not_counted(driver: EngineDriver) -> None:
    answer = driver.generate("first", PROMPT, max_tokens=12)
    rest = driver.generate("second", PROMPT, max_tokens=12, delivered=answer[:8])
    assert (answer[:8] + rest, cached(driver, "second")) == (answer, len(PROMPT))


def test_a_prefix_makes_room_and_its_next_reader_changes_no_token(
    tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter]
) -> None:
    driver = EngineDriver(tiny_checkpoint, tiny_adapters, num_pages=24)
    first = driver.generate("first", PROMPT)
    driver.generate("large", [3] * 93, max_tokens=2)
    assert cached(driver, "large") == 0
    assert (driver.generate("again", PROMPT), cached(driver, "again")) == (first, 0)
