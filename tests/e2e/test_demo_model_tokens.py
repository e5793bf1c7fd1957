"""The embedded model, whose logits are peaked: it finds facts more than a thousand tokens back only if every page on the way is the right one.

The truth is transformers in float32. The conversations are of the exam that the model is measured with (tools/demo_model): facts it was never trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from paged_backend.batch import Int32
from paged_backend.config import EngineConfig, demo_model_folder
from paged_backend.engine import Engine
from paged_backend.engine_process import load_engine
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams
from tests.oracle import Oracle
from tools.demo_model import exam

CONVERSATIONS = (9, 17, 18)  # of the long ones: 1,118 to 1,220 tokens up to the question
QUESTIONS_EACH = 2
NUM_STORIES = 2  # from the first conversations
FAR = 1000  # tokens between fact and answer
STORY = "<|user|>Tell me a story about a fox and a lantern.<|end|><|assistant|>"  # its answer outgrows several pages
MAX_TOKENS = 160
SPARE_TOKENS = 64  # beyond two conversations: less than their stories take


@dataclass(frozen=True)
class Asked:
    prompts: list[Int32]
    answers: list[list[int]]  # transformers', EOS included


@pytest.fixture(scope="module")
def asked() -> Asked:
    """Stories, asked for late in conversations, then questions about what was said early. Their answers are the exact ones: the model did find the facts."""
    folder = demo_model_folder()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    story = tuple(tokenizer.encode(STORY, add_special_tokens=False).ids)
    found = list(exam.held_out("long", max(CONVERSATIONS) + 1))
    sittings = [exam.sitting(tokenizer, found[number]) for number in CONVERSATIONS]
    far = [[item for item in sitting.items if item.distance is not None and item.distance >= FAR][:QUESTIONS_EACH] for sitting in sittings]
    prompts = [sitting.ids[: items[0].prompt_len] + items[0].answer_ids + story for sitting, items in zip(sittings[:NUM_STORIES], far, strict=False)]
    prompts += [sitting.ids[: item.prompt_len] for sitting, items in zip(sittings, far, strict=True) for item in items]
    answers = Oracle(folder).greedy(prompts, MAX_TOKENS)
    assert answers[NUM_STORIES:] == [list(item.answer_ids) for items in far for item in items]
    assert all("lantern" in tokenizer.decode(answer) and 60 < len(answer) < MAX_TOKENS for answer in answers[:NUM_STORIES])
    return Asked([np.array(prompt, np.int32) for prompt in prompts], answers)


def load(folder: Path, **options: object) -> Engine:
    engine, *_ = load_engine(EngineConfig.parse({"device": "cpu", "max_num_sequences": 16, "max_model_len": 2048, **options}), folder)
    return engine


def answers(engine: Engine, prompts: list[Int32]) -> list[list[int]]:
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    tokens: list[list[int]] = [[] for _ in prompts]
    for request_id, prompt in enumerate(prompts):
        engine.submit(Submit(request_id, prompt.tobytes(), sampling, (), "", 1e18))
    while not engine.idle:
        for output in engine.step():
            for request_id, token in zip(output.request_ids.tolist(), output.token_ids.tolist(), strict=True):
                tokens[request_id].append(token)
        engine.check()
    return tokens


@pytest.mark.parametrize(("page_size", "budget", "kv_dtype"), [(1, 2048, "float32"), (16, 100, "float32"), (256, 700, "float32"), (16, 2048, "bfloat16")])
def test_far_facts_are_found_whatever_the_pages_and_chunks_are(asked: Asked, tmp_path: Path, page_size: int, budget: int, kv_dtype: str) -> None:
    engine = load(tmp_path, page_size=page_size, num_pages=16_384 // page_size, max_batched_tokens=budget, kv_dtype=kv_dtype)
    assert answers(engine, asked.prompts) == asked.answers
    before, again = engine.stats().prefix_hits, slice(NUM_STORIES, None)
    assert answers(engine, asked.prompts[again]) == asked.answers[again]  # now with what the first round left in the cache
    pages = sum((len(prompt) - 1) // page_size for prompt in asked.prompts[again])
    assert engine.stats().prefix_hits - before == pages * page_size


@pytest.mark.parametrize(("page_size", "prefix_cache"), [(1, False), (16, True)])
def test_far_facts_are_found_after_preemption(asked: Asked, tmp_path: Path, page_size: int, prefix_cache: bool) -> None:
    num_pages = (len(asked.prompts[0]) + len(asked.prompts[1]) + SPARE_TOKENS) // page_size
    engine = load(tmp_path, page_size=page_size, num_pages=num_pages, max_batched_tokens=512, prefix_cache=prefix_cache)
    assert answers(engine, asked.prompts) == asked.answers
    assert engine.stats().num_preemptions > 0
