"""Warm-up steps stay within a runner's limits, whatever those are, and leave nothing behind that a request could
notice.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paged_backend.batch import AdapterUse, Batch, Feature, PromptScoring, TokenMasks
from paged_backend.runner.measured_memory import run_largest
from paged_backend.runner.step_plan import shape_of
from paged_backend.runner.warm_up import largest_batches, warm_up_batches
from tests.oracle import Oracle, random_prompts, save_checkpoint
from tests.runner_driver import Driver, load_runner

LIMITS = {
    "usual": (4096, 256, 2048, 16, 9999),
    "one page": (64, 8, 16, 16, 1),
    "one sequence": (512, 1, 512, 16, 32),
    "one token a step": (1, 1, 64, 16, 4),
    "pages of one token": (128, 16, 40, 1, 40),
    "small pool": (4096, 256, 30, 8, 4),
    "two tokens": (2, 2, 2, 1, 2),
    "fewer tokens than drafts": (4, 4, 64, 16, 16),
}


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_steps_fit_rows_pages_and_tokens(limits: tuple[int, int, int, int, int]) -> None:
    max_tokens, max_sequences, max_len, page_size, num_pages = limits
    for batch in warm_up_batches(*limits, vocab_size=199, adapters=True, num_drafts=15):
        assert 1 <= batch.num_tokens <= max_tokens
        assert len(set(batch.rows.tolist())) == batch.num_sequences <= max_sequences
        assert ((batch.starts >= 0) & (batch.counts >= 1) & (batch.starts + batch.counts <= max_len)).all()
        pages = batch.page_updates[:, 2]
        assert len(np.unique(pages)) == len(pages)
        assert (pages < num_pages).all()
        assert (batch.page_updates[:, 1] < -(-max_len // page_size)).all()


def test_the_usual_runner_sees_every_kind_of_step() -> None:
    batches = list(warm_up_batches(*LIMITS["usual"], vocab_size=199))
    assert max(batch.num_tokens for batch in batches) == 4095  # a token of the row is left for what the step samples
    assert len({batch.features for batch in batches}) == 8
    assert any(len(batch.page_copies) for batch in batches)
    masks = [batch.ask(TokenMasks) for batch in batches]
    assert [asked is not None for asked in masks] == [bool(batch.features & Feature.MASK) for batch in batches]
    assert all(
        asked is None or asked.words.shape == (batch.samples.sum(), 7)
        for batch, asked in zip(batches, masks, strict=True)
    )
    assert any(1 in batch.counts and batch.counts.max() > 1 for batch in batches)


def is_adapted(batch: Batch) -> bool:
    use = batch.ask(AdapterUse)
    return use is not None and use.in_use


def test_steps_with_adapters_are_those_of_a_server_that_has_some() -> None:
    batches = list(warm_up_batches(*LIMITS["usual"], vocab_size=199, adapters=True))
    adapted = [batch for batch in batches if is_adapted(batch)]
    assert [batch.num_tokens for batch in adapted] == [
        batch.num_tokens for batch in batches[: 2 * len(adapted)] if not is_adapted(batch)
    ]
    uses = [(batch, use) for batch in batches if (use := batch.ask(AdapterUse)) is not None]
    assert all(use.new_rows.tolist() == [[new.row, 0] for new in batch.new_rows] for batch, use in uses)
    assert not any(is_adapted(batch) for batch in warm_up_batches(*LIMITS["usual"], vocab_size=199))


def test_answers_after_a_warm_up_are_those_of_transformers(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, "LlamaForCausalLM")
    runner = load_runner(folder)
    assert runner.timed is None
    runner.warm_up(64, 512)
    assert runner.timed is not None
    batch, seconds = runner.timed
    assert batch.num_tokens > 500 and seconds > 0, "the step that tells what steps take"
    prompts = random_prompts((1, 9, 40))
    assert Driver(runner).generate(prompts, 8, chunk=7, arrive_every=1) == Oracle(folder).greedy(prompts, 8)


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
def test_the_largest_steps_have_all_tokens_and_rows_and_the_longest_sequence(
    limits: tuple[int, int, int, int, int],
) -> None:
    max_tokens, max_sequences, max_len = limits[:3]
    prompts, decodes = largest_batches(max_tokens, max_sequences, max_len, vocab_size=199, adapters=False)
    assert prompts.num_tokens == min(max_tokens, max_sequences * max_len)
    assert (decodes.counts == 1).all()
    for batch in (prompts, decodes):
        assert batch.num_sequences == max_sequences
        assert batch.samples.all()
        ends = batch.starts + batch.counts
        assert (batch.starts >= 0).all()
        assert ends[0] == max_len == ends.max()
        assert batch.page_updates.shape == (0, 3)
        assert (batch.page_copies < 2).all()
    assert prompts.counts.max() == prompts.counts[0]


def test_the_largest_steps_sample_in_every_way_there_is() -> None:
    prompts, decodes = largest_batches(64, 4, 100, vocab_size=199, adapters=True)
    ways = {value for name, value in vars(Feature).items() if name.isupper()} - {Feature.PROMPT_LOGPROBS}
    for batch in (prompts, decodes):
        assert all(batch.features & way for way in ways)
        assert is_adapted(batch)
    scoring = prompts.ask(PromptScoring)
    assert scoring is not None
    assert sum(span.count for span in scoring.spans) == prompts.counts[0]


@pytest.mark.parametrize(
    ("max_sequences", "num_drafts", "outputs"),
    [(8, 4, 40), (64, 15, 256), (256, 15, None), (256, 0, None), (1, 3, 4)],
)
def test_steps_with_more_outputs_than_sequences_are_among_the_largest(
    max_sequences: int, num_drafts: int, outputs: int | None
) -> None:
    _, _, *drafting = largest_batches(512, max_sequences, 64, 199, adapters=True, num_drafts=num_drafts)
    assert [shape_of(batch).num_outputs for batch in drafting] == ([] if outputs is None else [outputs])
    assert all(batch.num_tokens <= 512 and (batch.starts + batch.counts).max() == 64 for batch in drafting)


def test_the_largest_steps_of_a_runner_with_drafts_run(tmp_path: Path) -> None:
    runner = load_runner(save_checkpoint(tmp_path, "LlamaForCausalLM"), max_num_sequences=2, speculation="ngram")
    launched: list[Batch] = []
    launch = runner.launch
    runner.launch = lambda batch: (launched.append(batch), launch(batch))[1]  # type: ignore[method-assign]
    run_largest(runner, 64)
    assert [batch.drafts is not None for batch in launched] == [False, False, True]
