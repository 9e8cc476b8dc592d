"""An adapter whose products overflow fails its own requests; whoever shares its batches gets the same bits as alone."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from loraplex.v1 import types_pb2
from tests.gpu_worker.engine_driver import EngineDriver
from tests.gpu_worker.tiny_model import TinyAdapter, write_adapter

pytestmark = pytest.mark.usefixtures("step_mode")

PROMPT = list(range(2, 12))
MATES: dict[str, dict[str, Any]] = {
    "base": {"adapter": ""},
    "small": {"adapter": "rank-3"},
    "large": {"adapter": "rank-8", "temperature": 1.0, "seed": 5},
}


def of_one_value(adapter: TinyAdapter, value: float) -> TinyAdapter:
    """The same adapter with every weight `value`, and digests that say so: no checksum finds anything wrong."""
    adapter.path.write_bytes(np.full(adapter.layout.total_bytes // 4, value, np.float32).tobytes())
    content = adapter.content
    sha256, blake = hashlib.sha256(content).hexdigest(), blake3(content).hexdigest()
    return replace(adapter, layout=replace(adapter.layout, sha256=sha256, blake3=blake))


def answers(driver: EngineDriver) -> dict[str, list[bytes]]:
    """Tokens and log-probabilities of each mate, as bits."""
    found: dict[str, list[bytes]] = {name: [] for name in MATES}
    for message in driver.messages:
        if message.key.request_id in found:
            found[message.key.request_id] += [np.array(message.token_ids).tobytes()]
            found[message.key.request_id] += [logprobs.SerializeToString() for logprobs in message.logprobs]
    return found


def offer_mates(driver: EngineDriver) -> None:
    for name, options in MATES.items():
        driver.offer(name, PROMPT, max_tokens=12, output=types_pb2.OutputParams(logprobs=3), **options)


@pytest.mark.parametrize("value", [3e38, -3e38, 1e30])
def test_c10_batch_mates_of_an_adapter_that_overflows_answer_bit_for_bit(
    tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter], tmp_path: Path, value: float
) -> None:
    alone = EngineDriver(tiny_checkpoint, tiny_adapters)
    offer_mates(alone)
    alone.run()
    poison = of_one_value(write_adapter(tmp_path, "poison", lora_rank=8), value)
    driver = EngineDriver(tiny_checkpoint, [*tiny_adapters, poison])
    for adapter in ("rank-3", "rank-8"):
        driver.generate(f"loads {adapter}", PROMPT[::-1], adapter)
    for name, temperature in (("greedy", 0.0), ("drawn", 1.0)):
        driver.offer(name, PROMPT, "poison", temperature=temperature, seed=1)
        # Its pages come back to the pool full of NaN, and are somebody else's next.
        driver.run()
    driver.offer("greedy too", PROMPT, "poison")
    offer_mates(driver)
    driver.run()
    # The base counts as one.
    assert max(stats.distinct_adapters for stats in driver.stats) == 4
    assert all(answers(alone).values())
    assert answers(driver) == answers(alone)
    for name in ("greedy", "drawn", "greedy too"):
        ended = driver.ended[name]
        assert (ended.finish_reason, ended.error.reason) == (types_pb2.FINISH_REASON_ERROR, "LOGITS_NOT_FINITE")
        assert driver.tokens[name] == []


def test_every_output_of_a_request_that_overflows_ends(
    tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter], tmp_path: Path
) -> None:
    poison = of_one_value(write_adapter(tmp_path, "poison", lora_rank=8), 3e38)
    driver = EngineDriver(tiny_checkpoint, [*tiny_adapters, poison])
    driver.offer("three", PROMPT, "poison", output=types_pb2.OutputParams(n=3), temperature=1.0)
    driver.run()
    assert {name for name in driver.ended if name.startswith("three")} == {"three", "three/1", "three/2"}
    assert (driver.report.running_sequences, driver.report.waiting_sequences) == (0, 0)


def test_large_weights_that_do_not_overflow_are_served(
    tiny_checkpoint: Path, tiny_adapters: list[TinyAdapter], tmp_path: Path
) -> None:
    large = of_one_value(write_adapter(tmp_path, "large", lora_rank=8), 1e6)
    driver = EngineDriver(tiny_checkpoint, [*tiny_adapters, large])
    assert len(driver.generate("s", PROMPT, "large")) == 8
