"""Models whose layers keep different things: tokens are those of transformers, and pages that windows have left behind
are free for others.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from paged_backend.messages import Submit
from paged_backend.request import SamplingParams
from tests import engine_answers
from tests.oracle import Oracle, random_prompts, save_checkpoint

WINDOW = 20
CHECKPOINTS = {
    "qwen2, windows from layer 1": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        (None, WINDOW, WINDOW),
    ),
    "qwen3, every other layer": (
        "Qwen3ForCausalLM",
        {
            "head_dim": 16,
            "num_hidden_layers": 2,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        (None, WINDOW),
    ),
    "mistral, all layers": ("MistralForCausalLM", {"num_hidden_layers": 2, "sliding_window": WINDOW}, (WINDOW,)),
}
MAX_TOKENS = 40
Checkpoint = tuple[Path, list[np.ndarray], list[list[int]], tuple[int | None, ...]]

load = partial(engine_answers.load, max_num_sequences=8, max_model_len=200, debug_checks=True)
answers = partial(engine_answers.answers, max_tokens=MAX_TOKENS)


@pytest.fixture(scope="module", params=CHECKPOINTS.values(), ids=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    architecture, options, windows = request.param
    folder = save_checkpoint(tmp_path_factory.mktemp("checkpoint"), architecture, **options)
    prompts = random_prompts([1, 17, 64, 100, 150])
    prompts += [np.concatenate([prompts[-1][:130], prompt[:9]]) for prompt in prompts[1:3]]  # common beginnings
    return folder, prompts, Oracle(folder).greedy(prompts, MAX_TOKENS), windows


@pytest.mark.one_in(3)
@pytest.mark.parametrize("prefix_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize(("page_size", "budget"), [(1, 4096), (16, 32), (64, 64)])
def test_tokens_are_those_of_transformers(
    checkpoint: Checkpoint, tmp_path: Path, page_size: int, budget: int, prefix_cache: bool
) -> None:
    folder, prompts, expected, windows = checkpoint
    num_pages = len(windows) * 1280 // page_size
    engine = load(
        folder,
        tmp_path,
        page_size=page_size,
        num_pages=num_pages,
        max_batched_tokens=budget,
        prefix_cache=prefix_cache,
        debug_checks=False,
    )
    assert engine._scheduler._running.pages.windows == windows
    assert answers(engine, prompts) == expected
    assert answers(engine, prompts) == expected
    assert (engine.stats().prefix_hits > 0) == prefix_cache
    assert engine.stats().pages_held == 0


@pytest.mark.one_in(3)
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_preemption_changes_no_token(checkpoint: Checkpoint, tmp_path: Path, page_size: int) -> None:
    folder, prompts, expected, windows = checkpoint
    """In a tight pool, where sequences are preempted by chance, and by force now and then: some find their pages again,
    some do not.
    """
    num_pages = len(windows) * {1: 230, 16: 15, 64: 4}[page_size]
    engine = load(folder, tmp_path, page_size=page_size, num_pages=num_pages, max_batched_tokens=64)
    scheduler = engine._scheduler

    def preempt() -> None:
        running = scheduler._running.runners
        if engine.num_steps % 9 == 0 and running:
            scheduler._living.preempt(running[-1])

    assert answers(engine, prompts, preempt) == expected
    assert engine.stats().num_preemptions > 3


def test_pages_that_a_window_has_left_are_released_while_the_sequence_runs(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder, prompts, expected, windows = checkpoint
    page_size = 4
    engine = load(folder, tmp_path, page_size=page_size, num_pages=400, prefix_cache=False)
    held: list[int] = []

    def note() -> None:
        for sequence in engine._scheduler.sequences:
            held[:] = [
                len(pages) - num_gone
                for pages, num_gone in zip(sequence.page_table.groups, sequence.page_table.num_gone, strict=True)
            ]

    assert answers(engine, [prompts[4]], note) == [expected[4]]
    whole, within = (150 + MAX_TOKENS - 2) // page_size, WINDOW // page_size + 2
    assert all(
        num_pages >= whole if window is None else num_pages <= within
        for num_pages, window in zip(held, windows, strict=True)
    ), held


@pytest.mark.one_in(3)
def test_without_preemption_a_sequence_keeps_what_it_has(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, prompts, expected, windows = checkpoint
    engine = load(folder, tmp_path, page_size=4, num_pages=len(windows) * 60, preemption=False)
    assert answers(engine, prompts) == expected
    assert engine.stats().num_preemptions == 0


@pytest.mark.one_in(3)
def test_beams_of_several_groups_are_those_of_a_roomy_pool(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, prompts, _, windows = checkpoint
    found = []
    for num_pages in (400 * len(windows), 50 * len(windows)):
        engine = load(folder, tmp_path, page_size=4, num_pages=num_pages, max_batched_tokens=48)
        params = SamplingParams(max_tokens=12, temperature=0.0, use_beam_search=True, beam_width=3, n=3)
        for request_id, prompt in enumerate(prompts):
            engine.submit(Submit(request_id, prompt.tobytes(), params, (), "", 1e18))
        told = {}
        while not engine.idle:
            for output in engine.step():
                told |= {
                    one.request_id: [np.frombuffer(each.token_ids, np.int32).tolist() for each in one.sequences]
                    for one in output.feature_outputs
                }
        found.append(told)
    assert len(found[0]) == len(prompts) and found[0] == found[1]
