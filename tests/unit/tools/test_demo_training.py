"""tools/demo_model: shards of the training text, and the training itself on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from paged_backend.models.architecture import read_architecture
from tools.demo_model import train
from tools.demo_model.chat import Weight
from tools.demo_model.generator import conversations
from tools.demo_model.model import DemoModel, Shape, documents_of, masked_attention
from tools.demo_model.optimizer import orthogonal
from tools.demo_model.recipe import Pace, Recipe, rate_share
from tools.demo_model.saved_state import load_state, read_progress
from tools.demo_model.shards import (
    ID_BITS,
    ShardPlan,
    encoded,
    packed,
    shard_stream,
    token_ids,
    write_shard,
)
from tools.demo_model.validation import exact_answers, validate
from tools.demo_model.world import Split

# ---- shards


@pytest.mark.long
def test_a_shard_is_the_same_whoever_writes_it(tokenizer: Tokenizer) -> None:
    plan = ShardPlan(rows_per_shard=4, row_len=512, early_shards=1)
    with (
        shard_stream(tokenizer, plan, first=0, num_processes=0) as alone,
        shard_stream(tokenizer, plan, first=0, num_processes=1) as written,
    ):
        for number in range(2):
            shard = next(written)
            assert shard.shape == (4, 512) and shard.dtype == np.int16
            assert (shard == next(alone)).all() and (shard == write_shard(tokenizer, plan, number)).all()


def test_a_row_holds_whole_conversations_and_padding_that_does_not_count() -> None:
    rows = list(islice(packed((list(range(1, length + 1)) for length in 30 * [3, 9, 5, 12]), row_len=10), 3))
    for row in rows:
        assert len(row) == 10
        assert [value for before, value in zip([0, *row], row, strict=False) if value != before + 1] in (
            [],
            [1] * row.count(1),
            [*([1] * (row.count(1) - 1))],
        ) or 1 in row


def test_only_what_the_assistant_says_weighs_full(tokenizer: Tokenizer) -> None:
    found = next(each for each in conversations(1, Split.TRAIN) if each.exchanges)
    (row,) = encoded(tokenizer, [found])
    codes = np.array(row) >> ID_BITS
    ids = token_ids(np.array(row, np.int16)).tolist()
    turn, seen = -1, []
    for token, code in zip(ids[1:], codes[1:].tolist(), strict=True):
        if token in (2, 3, 4):
            turn += 1
            assert code == Weight.GIVEN.value
        else:
            assert code == found.turns[turn].weight.value
            seen.append(code)
    assert {Weight.GIVEN.value} < set(seen)


# ---- model and training


def test_the_logits_are_those_of_transformers(tiny_folder: Path) -> None:
    torch.manual_seed(0)
    ours = DemoModel(
        Shape(hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16)
    )
    theirs = LlamaForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    ids = torch.randint(5, 400, (2, 60))
    ids[:, 0] = 0
    with torch.no_grad():
        expected = theirs(ids).logits
        logits = ours(ids, masked_attention(documents_of(ids)))
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    assert read_architecture(tiny_folder).eos_ids == (1,)


def test_a_conversation_does_not_see_its_neighbour() -> None:
    torch.manual_seed(0)
    model = DemoModel(
        Shape(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16)
    )
    ids = torch.randint(5, 400, (1, 20))
    ids[0, 0] = ids[0, 8] = 0
    with torch.no_grad():
        together = model(ids, masked_attention(documents_of(ids)))[:, 8:]
        ids[0, 1:8] = 7
        assert torch.equal(model(ids, masked_attention(documents_of(ids)))[:, 8:], together)


def test_the_loss_of_a_cpu_is_the_loss_with_a_mask(tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    tiny = Recipe.tiny()
    model = DemoModel(tiny.shape)
    rows = torch.from_numpy(write_shard(tokenizer, replace(tiny.plan, rows_per_shard=2), 0))
    weights = torch.tensor((0.0, 0.0, 0.5, 1.0))
    gradients = []
    for loss in (train._masked_loss, train._loss_by_document):
        value = loss(model, weights, torch.float32)(rows)
        value.backward()
        gradients.append((value.detach(), *(parameter.grad for parameter in model.parameters())))
        model.zero_grad(set_to_none=True)
    for masked, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, masked, rtol=1e-4, atol=1e-6)


def test_muons_updates_are_close_to_orthogonal() -> None:
    torch.manual_seed(0)
    for shape in ((2, 8, 24), (2, 24, 8)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape), torch.float32))
        assert values.min() > 0.5 and values.max() < 1.3


def test_the_learning_rate_rises_stays_and_falls() -> None:
    recipe = replace(Recipe(), warmup_tokens=100, decay_share=0.5)
    shares = [rate_share(recipe, tokens, 1000) for tokens in (0, 50, 100, 499, 750, 1000, 1100)]
    assert shares == pytest.approx([0.01, 0.51, 1, 1, 0.5, 0, 0])
    assert rate_share(recipe, 10**9, None) == 1


def test_the_pace_leaves_time_for_every_commands_start() -> None:
    one, two = Pace(960, 960), Pace(500, 960)
    assert one.total_tokens(1000, 100.0, used_before=0, used_now=60, start_seconds=40) == 1000 + int(900 * 0.96 * 100)
    assert two.total_tokens(1000, 100.0, used_before=0, used_now=60, start_seconds=40) == 1000 + int(860 * 0.96 * 100)
    assert two.total_tokens(1000, 100.0, used_before=500, used_now=60, start_seconds=40) == 1000 + int(400 * 0.96 * 100)


def test_exact_answers_are_runs_without_a_wrong_token() -> None:
    codes = np.array([[3, 3, 1, 3, 3], [3, 0, 3, 1, 1]])
    wrong = np.array([[0, 0, 1, 0, 1], [0, 1, 1, 0, 0]], bool)
    assert exact_answers(wrong, codes) == 0.5


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    shape = Shape(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16)
    plan = ShardPlan(rows_per_shard=4, row_len=256, early_shards=1 << 20)
    recipe = replace(
        Recipe.tiny(),
        shape=shape,
        plan=plan,
        warmup_tokens=1000,
        tokenizer_conversations=100,
        validation_rows=2,
        rows_per_step=2,
    )
    monkeypatch.setattr(Recipe, "tiny", staticmethod(lambda: recipe))
    return recipe


@pytest.mark.long
def test_a_training_that_is_cut_off_goes_on(tiny: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def command(*options: str) -> None:
        places = (
            "--output",
            str(tmp_path / "model"),
            "--state",
            str(tmp_path / "state"),
            "--curve",
            str(tmp_path / "loss.jsonl"),
        )
        monkeypatch.setattr(
            "sys.argv", ["train", "--tiny", "--processes", "0", "--report-seconds", "0", *places, *options]
        )
        monkeypatch.setattr(train, "_STARTED", train.time.monotonic())
        train.main()

    command("--total-tokens", "20000", "--minutes", str(train._SAVING_SECONDS / 60))  # time for one shard
    assert read_progress(tmp_path / "state").num_tokens == 1024
    command("--total-tokens", "8000", "--resume")
    points = [json.loads(line) for line in (tmp_path / "loss.jsonl").read_text().splitlines()]
    assert [point["tokens"] for point in points] == [1024 * index for index in range(1, 9)]
    assert points[-1]["validation"]["given"] < points[0]["validation"]["given"] - 0.3
    model = DemoModel(tiny.shape)
    optimizer = train.Optimizer(model, tiny.rates, torch.float32)
    load_state(tmp_path / "state", model, optimizer, read_progress(tmp_path / "state"))
    rows = torch.from_numpy(
        write_shard(
            Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json")),
            replace(tiny.plan, rows_per_shard=2),
            0,
            Split.HELD_OUT,
        )
    )
    assert validate(model, rows, torch.float32)["given"] == pytest.approx(points[-1]["validation"]["given"], abs=0.001)
    assert LlamaForCausalLM.from_pretrained(tmp_path / "model").config.num_key_value_heads == 1
