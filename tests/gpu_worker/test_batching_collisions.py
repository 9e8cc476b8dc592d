"""A pool in which no two sequences fit at their full length: everybody finishes, and little is computed twice."""

import random
from collections import Counter

import pytest

from gpu_worker.batching import Batcher
from gpu_worker.memory.manager import MemoryManager
from tests.gpu_worker.support import SMALL_PAGES, waiting_sequence

NUM_REQUESTS = 1000
NUM_PAGES = 12
PAGE = SMALL_PAGES.page_size
# Tokens of a sequence in the end: more than half of the pool, up to nearly all of it.
SHORTEST, LONGEST = (NUM_PAGES // 2) * PAGE + 1, (NUM_PAGES - 1) * PAGE
MOST_PREEMPTIONS = 3
MOST_RECOMPUTED = 0.20


class Engine:
    """Draws token 0 for whoever is in the step, and counts."""

    def __init__(self, seed: int, prompt_share: float) -> None:
        draw = random.Random(seed)
        self.memory = MemoryManager(SMALL_PAGES, NUM_PAGES)
        self.batcher = Batcher(self.memory, lambda adapter: None, max_step_tokens=16, max_sequences=8)
        self.computed = self.finished = 0
        self.preemptions: Counter[str] = Counter()
        # Tokens that somebody has to compute: all but the last one drawn.
        self.needed = 0
        for number in range(NUM_REQUESTS):
            total = draw.randrange(SHORTEST, LONGEST)
            prompt = max(1, min(total - 1, round(total * prompt_share * draw.uniform(0.5, 1.5))))
            self.needed += total - 1
            # Nobody begins like anybody else.
            sequence = waiting_sequence(
                f"s{number}", prompt, max_tokens=total - prompt, order_key=number, first_token=100 * number
            )
            self.batcher.add(sequence)

    def run(self) -> None:
        step = 0
        while list(self.batcher.running) or self.batcher.num_waiting:
            plan = self.batcher.plan(step)
            assert plan.chunks, "nobody makes progress"
            step += 1
            self.preemptions.update(sequence.sequence_id for sequence in plan.preempted)
            for chunk in plan.chunks:
                self.batcher.launch(chunk)
                self.batcher.complete(chunk)
                self.computed += chunk.length
                if chunk.samples:
                    chunk.sequence.pending_tokens = 0
                    chunk.sequence.output_token_ids.append(0)
                    if len(chunk.sequence.output_token_ids) == chunk.sequence.stopping.max_tokens:
                        self.batcher.remove(chunk.sequence, step)
                        self.finished += 1
            self.memory.complete(step)
        self.memory.check_integrity()


@pytest.mark.parametrize("prompt_share", [0.2, 0.5, 0.9], ids=["long answers", "half and half", "long prompts"])
def test_sequences_that_collide_finish_with_little_computed_twice(prompt_share: float) -> None:
    engine = Engine(1, prompt_share)
    engine.run()
    assert engine.finished == NUM_REQUESTS
    assert sum(engine.preemptions.values()) > 0, "nobody collided"
    assert max(engine.preemptions.values()) <= MOST_PREEMPTIONS
    assert engine.computed <= (1 + MOST_RECOMPUTED) * engine.needed
