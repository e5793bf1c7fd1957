"""A flood of long prompts does not keep short ones waiting; the bounds are counted in steps, tokens and starts."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from paged_backend.arrays import Int32
from paged_backend.scheduler.fairness import share_out, short_len
from paged_backend.scheduler.step_budget import StepBudget
from paged_backend.scheduler.step_costs import PromptCosts
from tests.simulated_runner import solo
from tests.unit.scheduler.bench import VOCAB, Bench

LONG = 60


def flooded(num_long: int = 40, **limits: object) -> Bench:
    """Long prompts, none like another, all there before anybody else."""
    bench = Bench(
        **(
            {
                "num_pages": 400,
                "page_size": 4,
                "max_model_len": 80,
                "max_num_sequences": 60,
                "max_batched_tokens": 32,
                "prefix_cache": False,
            }
            | limits
        )
    )
    for number in range(num_long):
        bench.submit(number, [number, *[9] * (LONG - 1)], max_tokens=12)
    bench.step(2)
    return bench


def first_step(bench: Bench, request_id: int) -> int:
    """The number of the step that computed all of a prompt."""
    return next(at for at, batch in enumerate(bench.batches) if request_id in batch.request_ids[batch.samples])


def test_a_short_prompt_behind_forty_long_ones_is_computed_in_the_next_step() -> None:
    bench = flooded()
    now = len(bench.batches)
    bench.submit(100, [7, 8, 9], max_tokens=5)
    bench.run()
    assert first_step(bench, 100) <= now + 1
    assert bench.tokens[100] == solo([7, 8, 9], 5, (), VOCAB)
    assert all(bench.tokens[number] == solo([number, *[9] * (LONG - 1)], 12, (), VOCAB) for number in range(40))


def test_its_answer_gets_a_token_in_every_step() -> None:
    bench = flooded()
    bench.submit(100, [7, 8, 9], max_tokens=10)
    bench.run()
    first = first_step(bench, 100)
    assert all(100 in batch.request_ids for batch in bench.batches[first : first + 10])


def test_many_short_prompts_get_half_of_what_decodes_leave_and_long_ones_the_rest() -> None:
    """k tokens of short prompts need k / (budget / 2) steps, whatever waits before them."""
    bench = flooded()
    now = len(bench.batches)
    for number in range(100, 116):
        # 64 tokens in all, 16 of each step are kept for them
        bench.submit(number, [number - 90, 1, 2, 3], max_tokens=2)
    bench.run()
    # their own decodes take some
    assert max(first_step(bench, number) for number in range(100, 116)) <= now + 64 // 16 + 2
    long_tokens = [int(batch.counts[batch.request_ids < 100].sum()) for batch in bench.batches[now : now + 4]]
    assert min(long_tokens) >= 8, "long prompts starve"


def test_with_all_rows_taken_every_second_start_is_a_short_one() -> None:
    """A short prompt that k short ones are before waits for k + 1 long ones to start at most, not for all of them."""
    bench = flooded(num_long=20, max_num_sequences=2)
    for number in range(100, 104):
        bench.submit(number, [number - 90, 1], max_tokens=2)
    bench.run()
    starts = [
        new
        for batch in bench.batches
        for new in batch.request_ids[np.isin(batch.rows, [row.row for row in batch.new_rows])].tolist()
    ]
    for behind, number in enumerate(range(100, 104)):
        assert sum(start < 100 for start in starts[: starts.index(number)]) <= 2 + behind + 1  # two ran before it came


@pytest.mark.parametrize("num_pages", [20, 23])
def test_with_all_pages_taken_long_prompts_do_not_starve_for_short_ones(num_pages: int) -> None:
    """Whoever waits for pages gets them before anybody else does."""
    bench = flooded(num_long=3, num_pages=num_pages)
    for number in range(100, 160):
        bench.submit(number, [number - 90, 1], max_tokens=8)
    bench.run()
    order = list(bench.finishes)
    assert max(order.index(number) for number in range(3)) < 30


def test_a_short_prompt_of_lower_priority_does_not_overtake() -> None:
    bench = flooded(num_long=6, max_num_sequences=1)
    bench.submit(100, [7], max_tokens=2, priority_level=1)
    bench.run()
    assert list(bench.finishes)[-1] == 100


def shared(wanted: list[int], budget: int, waiting_short_tokens: int) -> tuple[NDArray[np.intp], Int32]:
    """As a step of that many tokens is shared out, nobody's time being short."""
    left = StepBudget(PromptCosts(), budget - wanted.count(1))
    starts = np.zeros(len(wanted), np.int32)
    return share_out(np.array(wanted, np.int32), starts, left, short_len(budget), waiting_short_tokens)


def test_nothing_of_the_budget_is_kept_for_nobody() -> None:
    order, counts = shared([30, 1, 3, 50], 64, 0)
    assert (order.tolist(), counts.tolist()) == ([1, 2, 0, 3], [1, 3, 30, 30])


def test_up_to_half_of_what_decodes_leave_is_kept_for_short_prompts_that_wait() -> None:
    assert short_len(64) == 8
    order, counts = shared([40, 1, 1, 50], 64, 1000)
    assert (order.tolist(), counts.tolist()) == ([1, 2, 0], [1, 1, 31])
    order, counts = shared([40, 1, 1, 50], 64, 5)
    assert (order.tolist(), counts.tolist()) == ([1, 2, 0, 3], [1, 1, 40, 17])


def test_a_budget_of_one_token_is_shared_out() -> None:
    order, counts = shared([5], 1, 9)
    assert (order.tolist(), counts.tolist()) == ([0], [1])
