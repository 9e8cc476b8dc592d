"""The floors and goals of `make bench-gpu`: plain arithmetic, against what was worked out by hand."""

import numpy as np
import pytest

from benchmarks.gpu import goals, serving, steps
from benchmarks.gpu.machine import Floors
from benchmarks.gpu.shapes import MODELS, PAGE_SIZE

LLAMA = MODELS["llama-3.1-8b"]
# An H200 by its data sheet.
H200 = Floors(4.8e12, 4.8e12, 989e12)


@pytest.mark.parametrize(
    ("sequences", "adapters", "rank", "tokens_per_second"),
    [
        *((1, 1, 16, 315), (32, 0, 16, 7957), (32, 32, 16, 6985), (128, 0, 16, 19087), (128, 1, 16, 19038)),
        *((128, 32, 16, 17618), (128, 128, 16, 14313), (128, 128, 64, 8177), (256, 256, 16, 17345)),
    ],
)
def test_the_floor_of_a_decode_step_is_weights_context_and_each_adapter_once(
    sequences: int, adapters: int, rank: int, tokens_per_second: float
) -> None:
    """Bounds worked out by hand for contexts of 1,024, with weights of 15.0 GB and times of three digits."""
    work = steps.Workload("decode", sequences, 1, 1024, adapters, rank)
    assert sequences / steps.floor_seconds(LLAMA, work, 2, H200) == pytest.approx(tokens_per_second, rel=5e-3)


@pytest.mark.parametrize(("tokens", "tokens_per_second"), [(512, 65_000), (2048, 64_000), (8192, 58_000)])
def test_the_floor_of_a_prompt_is_its_products(tokens: int, tokens_per_second: float) -> None:
    """The bounds by hand multiply the last token alone with the vocabulary, or all of them: that is 7 %."""
    work = steps.Workload("prefill", 1, tokens, tokens, 0)
    assert tokens / steps.floor_seconds(LLAMA, work, 2, H200) == pytest.approx(tokens_per_second, rel=0.08)


def test_a_goal_says_whether_it_was_reached() -> None:
    assert goals.at_most("lora_tax", 0.03, 0.03) == {"lora_tax": 0.03, "goal": "lora_tax <= 0.03", "reached": True}
    assert not goals.at_most("lora_tax", 0.031, 0.03)["reached"]
    assert goals.at_least("share_of_copy", 0.8, 0.8)["reached"]
    assert not goals.at_least("share_of_copy", 0.79, 0.8)["reached"]


def test_requests_differ_in_their_adapters_alone() -> None:
    few, many = (serving.draw(serving.FULL, count, LLAMA.vocab, seed=0) for count in serving.FULL.counts)
    assert [one.prompt_token_ids for one in few] == [one.prompt_token_ids for one in many]
    assert [one.stopping for one in few] == [one.stopping for one in many]
    assert len({one.adapter_version for one in few}) == 5
    assert len({one.adapter_version for one in many}) > 150
    # a context stays within the narrowest table of pages, so that a width of a batch is one graph
    assert max(len(one.prompt_token_ids) + one.stopping.max_tokens for one in many) <= 64 * PAGE_SIZE


def test_another_seed_draws_other_requests() -> None:
    first, second = (serving.draw(serving.FULL, 5, LLAMA.vocab, seed) for seed in (0, 1))
    assert not np.array_equal(
        [len(one.prompt_token_ids) for one in first], [len(one.prompt_token_ids) for one in second]
    )
