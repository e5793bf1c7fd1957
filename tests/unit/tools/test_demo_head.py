"""tools/demo_model: the draft head as it is trained, and what it is trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from paged_backend.config import EngineConfig
from paged_backend.models.checkpoint import open_checkpoint
from tests.eagle3_definition import Definition
from tools.demo_model import model_files, train_head
from tools.demo_model.chat import Weight
from tools.demo_model.draft_head import DraftHead, HeadShape
from tools.demo_model.model import DemoModel, Shape
from tools.demo_model.optimizer import Optimizer
from tools.demo_model.recipe import HeadRecipe
from tools.demo_model.shards import ID_BITS, write_shard
from tools.demo_model.vocabulary import BOS_ID

SHAPE = Shape(hidden_size=64, intermediate_size=96, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=32)
HEAD_SHAPE = HeadShape(64, 80, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=300, taps=(1, 2, 4))
RECIPE = HeadRecipe(
    shape=HEAD_SHAPE,
    plan=replace(HeadRecipe().plan, rows_per_shard=4, row_len=512),
    counted_rows=4,
    warmup_tokens=1000,
    validation_rows=2,
)
NUM_STEPS = 30


@pytest.fixture
def model() -> DemoModel:
    torch.manual_seed(0)
    return DemoModel(SHAPE).requires_grad_(False)


def rows_of(*texts: list[int]) -> torch.Tensor:
    """int16 [len(texts), T], every token of an answer but a first one."""
    said = Weight.FREE.value << ID_BITS
    return torch.tensor([[text[0], *(token | said for token in text[1:])] for text in texts], dtype=torch.int16)


def test_training_unrolls_a_head_as_it_is_defined(model: DemoModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Two conversations in a row: neither sees the other."""
    head = DraftHead(HEAD_SHAPE, model, torch.randperm(400)[:300].sort().values)
    for norm in (head.token_norm, head.state_norm, head.mlp_norm, head.final_norm):
        torch.nn.init.uniform_(norm, 0.5, 1.5)
    model_files.save(model, tokenizer, tmp_path / "model", torch.float32)
    model_files.save_head(head, SHAPE, tmp_path / "model" / "draft_head", torch.float32)
    definition = Definition(tmp_path / "model", tmp_path / "model" / "draft_head", HEAD_SHAPE.taps)
    texts = [[BOS_ID, *torch.randint(200, 400, (length,)).tolist()] for length in (12, 9)]
    guesses = [definition.guesses(text, train_head.NUM_GUESSES) for text in texts]
    (first, second) = ([*text, *own] for text, own in zip(texts, guesses, strict=True))
    rows = rows_of(first + second)
    said = train_head.listen(model, rows, torch.float32)
    ids = (rows & ((1 << ID_BITS) - 1)).long()
    starts = said.starts.indices.tolist()
    for number, logits in enumerate(head.guesses(ids, said.answers, said.starts, train_head.NUM_GUESSES)):
        found = head.token_ids[logits.argmax(-1)].tolist()
        for begin, text, expected in ((0, texts[0], guesses[0]), (len(first), texts[1], guesses[1])):
            assert found[starts.index(begin + len(text) - 2)] == expected[number]


def test_guesses_begin_in_answers_and_count_to_their_end(model: DemoModel) -> None:
    rows = rows_of([BOS_ID, *range(200, 220)])
    rows[0, 8:12] &= (1 << ID_BITS) - 1  # what a user says
    said = train_head.listen(model, rows, torch.float32)
    # the token after a start is of an answer, and so is the first that is guessed
    assert said.starts.indices.tolist() == [*range(6), *range(11, 19)]
    assert said.counted.sum(1).tolist() == [4, 4, 4, 3, 2, 1, *(min(4, 19 - start) for start in range(11, 19))]
    states, _ = model.states(rows.long() & ((1 << ID_BITS) - 1), lambda q, k, v: _causal(q, k, v), torch.float32)
    expected = model.head(states)[0].softmax(-1)
    for number in range(train_head.NUM_GUESSES):
        at = said.starts.indices[said.counted[:, number]] + number + 1
        torch.testing.assert_close(said.chances[said.place(number)], expected[at], rtol=1e-4, atol=1e-7)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.long
def test_a_head_learns_what_the_model_says(model: DemoModel, tokenizer: Tokenizer) -> None:
    model.embedding *= 10  # sure of what it says
    head = DraftHead(HEAD_SHAPE, model, train_head.frequent_tokens(tokenizer, RECIPE))
    rows = torch.from_numpy(write_shard(tokenizer, RECIPE.plan, 0))[:1, :200].repeat(2, 1)
    said = train_head.listen(model, rows, torch.float32)
    optimizer = Optimizer(head, RECIPE.rates, torch.float32)
    before = train_head.acceptance(head, model, rows, torch.float32)
    for _ in range(NUM_STEPS):
        train_head.loss_of(head, rows, said).backward()
        optimizer.step(0.5)
    after = train_head.acceptance(head, model, rows, torch.float32)
    assert before[0] < 0.1 and after[0] > 0.4


def test_the_command_leaves_a_head_that_is_served_and_its_curve(
    model: DemoModel, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_files.save(model, tokenizer, tmp_path / "model")
    monkeypatch.setattr(train_head, "HeadRecipe", lambda: RECIPE)
    monkeypatch.setattr(train_head, "Shape", lambda: SHAPE)
    places = (
        "--model",
        tmp_path / "model",
        "--output",
        tmp_path / "model" / "draft_head",
        "--curve",
        tmp_path / "curve",
    )
    monkeypatch.setattr("sys.argv", ["train_head", *map(str, places), "--minutes", "0.01", "--report-seconds", "0"])
    train_head.main()
    points = [json.loads(line) for line in (tmp_path / "curve").read_text().splitlines()]
    assert [point["tokens"] for point in points] == [1024 * (number + 1) for number in range(len(points))]
    assert len(points[-1]["acceptance"]) == train_head.NUM_GUESSES
    proposer = open_checkpoint(EngineConfig.parse({"model": str(tmp_path / "model"), "speculation": "eagle3"})).proposer
    assert proposer is not None and proposer.eagle is not None and proposer.eagle.taps == HEAD_SHAPE.taps
