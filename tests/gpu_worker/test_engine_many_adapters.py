"""No number of adapters and no rank is set anywhere: a batch has as many as come, of any rank that fits in bytes."""

from pathlib import Path

import pytest

from gpu_worker.config import EngineConfig
from tests.gpu_worker.engine_driver import EngineDriver
from tests.gpu_worker.tiny_model import PAGE_BYTES, TinyAdapter, write_adapter

pytestmark = pytest.mark.usefixtures("step_mode")

PROMPT = list(range(2, 8))
NUM_ADAPTERS = 300
# More steps than the prompts take.
MAX_TOKENS = 16


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> list[TinyAdapter]:
    folder = tmp_path_factory.mktemp("many")
    small = [write_adapter(folder, f"a{number}", lora_rank=1 + number % 4) for number in range(NUM_ADAPTERS - 1)]
    return [*small, write_adapter(folder, "rank-256", lora_rank=256)]


def test_three_hundred_adapters_and_one_of_rank_256_run_in_one_batch(
    tiny_checkpoint: Path, library: list[TinyAdapter]
) -> None:
    defaults = EngineConfig(model=tiny_checkpoint)
    limits = {"max_step_tokens": defaults.max_step_tokens, "max_sequences": defaults.max_sequences}
    num_pages = sum(adapter.num_pages for adapter in library) + 6 * NUM_ADAPTERS
    assert num_pages * PAGE_BYTES < 512 * 2**20, "more than a worker has by default"
    driver = EngineDriver(tiny_checkpoint, library, num_pages, **limits)
    driver.hold_loads = True
    for number, adapter in enumerate(library):
        driver.offer(adapter.version, PROMPT, adapter.version, max_tokens=MAX_TOKENS, order_key=number)
    driver.run()
    while len(driver._held) < NUM_ADAPTERS:
        driver.wait_for_load()
        driver.run()
    driver.finish_loads()
    driver.run()
    assert max(stats.distinct_adapters for stats in driver.stats) == NUM_ADAPTERS
    together = {adapter.version: driver.tokens[adapter.version] for adapter in library}
    assert {len(tokens) for tokens in together.values()} == {MAX_TOKENS}
    for name in ("a0", "a150", "rank-256"):
        assert driver.generate(f"{name} alone", PROMPT, name, max_tokens=MAX_TOKENS) == together[name]


def test_no_option_limits_adapters_or_ranks() -> None:
    fields = EngineConfig.__dataclass_fields__
    assert [name for name in fields if "lora" in name or "rank" in name or "adapter" in name] == []
