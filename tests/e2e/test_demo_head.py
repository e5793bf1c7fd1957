"""The embedded model's draft head, which was trained for it (tools/demo_model): it is found without a name, guesses
right on conversations that it was never trained on, and changes no token.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from paged_backend.arrays import Int32
from paged_backend.config import EngineConfig, demo_model_folder
from paged_backend.engine.engine import Engine
from paged_backend.models.checkpoint import open_checkpoint
from tests.engine_answers import answers, load
from tools.demo_model.chat import Weight
from tools.demo_model.draft_head import DraftHead, HeadShape
from tools.demo_model.generator import conversations
from tools.demo_model.model import DemoModel, Shape
from tools.demo_model.model_files import save_head
from tools.demo_model.shards import ID_BITS, encoded
from tools.demo_model.world import Split

NUM_PROMPTS = 6
SEARCHED = 60  # conversations, for answers that are long enough
MOST_PROMPT_TOKENS = 400
MAX_TOKENS = 48
SHORTEST_ANSWER = 20  # of what the text says, so that there is something to guess
MOST_BYTES = 3_000_000
LEAST_SAVED = 0.35  # of the answers' tokens were guesses; stories take a turn that none can guess every few words
MOST_SAVED_UNTRAINED = 0.05
MORE_IN_CIRCLES = 1.3


@pytest.fixture(scope="module")
def prompts() -> list[Int32]:
    """Held-out conversations up to their longest answer."""
    tokenizer = Tokenizer.from_file(str(demo_model_folder() / "tokenizer.json"))
    found = []
    for row in encoded(tokenizer, islice(conversations("draft head", Split.HELD_OUT), SEARCHED)):
        begin, length = longest_answer(np.array(row) >> ID_BITS >= Weight.FREE.value)
        if length >= SHORTEST_ANSWER and 1 < begin <= MOST_PROMPT_TOKENS:
            found.append(np.array(row[:begin], np.int32) & ((1 << ID_BITS) - 1))
    assert len(found) >= NUM_PROMPTS
    return found[:NUM_PROMPTS]


def longest_answer(is_said: np.ndarray) -> tuple[int, int]:
    """Where the longest run of tokens of an answer begins, and how long it is."""
    edges = np.flatnonzero(np.diff(np.pad(is_said, 1).astype(np.int8)))
    lengths = edges[1::2] - edges[::2]
    return (int(edges[2 * lengths.argmax()]), int(lengths.max())) if len(lengths) else (0, 0)


def engine(folder: Path, **options: object) -> Engine:
    return load(demo_model_folder(), folder, max_num_sequences=16, max_model_len=1024, num_pages=512, **options)


def test_it_lies_beside_the_model_and_is_small() -> None:
    folder = demo_model_folder() / "draft_head"
    assert sum(path.stat().st_size for path in folder.iterdir()) < MOST_BYTES
    for speculation in ("eagle3", "auto"):
        proposer = open_checkpoint(EngineConfig.parse({"speculation": speculation})).proposer
        assert proposer is not None and (proposer.kind, proposer.folder) == ("eagle3", folder)
    for speculation in ("off", "ngram"):
        assert open_checkpoint(EngineConfig.parse({"speculation": speculation})).proposer is None


def test_answers_are_those_without_it_and_many_tokens_were_guessed(prompts: list[Int32], tmp_path: Path) -> None:
    plain, guessing = engine(tmp_path, speculation="off"), engine(tmp_path, speculation="eagle3")
    for sampling in ({"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.95, "seed": 5}):
        expected = answers(plain, prompts, max_tokens=MAX_TOKENS, **sampling)
        before = guessing.stats().drafts_accepted
        assert answers(guessing, prompts, max_tokens=MAX_TOKENS, **sampling) == expected
        assert guessing.stats().drafts_accepted - before > LEAST_SAVED * sum(map(len, expected))


# in CI: tests/unit/scheduler/test_repetition.py
@pytest.mark.long
def test_a_text_that_repeats_itself_goes_on_as_it_did(prompts: list[Int32], tmp_path: Path) -> None:
    """With auto, which is otherwise the head's: what was said is made likelier, so that the answer goes in circles."""
    circles = {"temperature": 0.0, "frequency_penalty": -2.0, "ignore_eos": True}
    plain, head, both = (engine(tmp_path, speculation=speculation) for speculation in ("off", "eagle3", "auto"))
    both._scheduler.speculation._costs = None  # guesses are had whatever they take
    expected = answers(plain, prompts[:2], max_tokens=150, **circles)
    assert answers(head, prompts[:2], max_tokens=150, **circles) == expected
    assert answers(both, prompts[:2], max_tokens=150, **circles) == expected
    assert both.stats().drafts_accepted > MORE_IN_CIRCLES * head.stats().drafts_accepted


def test_an_untrained_head_guesses_hardly_any(prompts: list[Int32], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DemoModel(Shape())
    save_head(DraftHead(HeadShape(), model, torch.arange(HeadShape().vocab_size)), model.shape, tmp_path / "head")
    guessing = engine(tmp_path, speculation="eagle3", draft_model=str(tmp_path / "head"))
    num_tokens = sum(map(len, answers(guessing, prompts, max_tokens=MAX_TOKENS)))
    assert guessing.stats().drafts_proposed > 0
    assert guessing.stats().drafts_accepted < MOST_SAVED_UNTRAINED * num_tokens
