"""What the tests of tools/demo_model read and write with."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tools.demo_model.chat import Conversation
from tools.demo_model.generator import MAIN, conversation
from tools.demo_model.model import DemoModel, Shape
from tools.demo_model.model_files import save
from tools.demo_model.shards import make_tokenizer
from tools.demo_model.world import Split

FORMS = [form for form in MAIN.forms if form != "book"]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer(num_conversations=150)


@pytest.fixture(scope="session")
def some() -> list[Conversation]:
    """Conversations of every form, of both splits."""
    return [
        conversation(random.Random(f"{form} {seed}"), split, form)
        for split in Split
        for form in [*FORMS, "ten turns"]
        for seed in range(8)
    ]


@pytest.fixture(scope="session")
def tiny_folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    save(
        DemoModel(Shape(hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16)),
        tokenizer,
        folder,
        torch.float32,
    )
    return folder
