"""The embedded model, whose logits are peaked: it finds facts more than a thousand tokens back only if every page on
the way is the right one.

The truth is transformers in float32. The conversations are of the exam that the model is measured with
(tools/demo_model): facts it was never trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from paged_backend.arrays import Int32
from paged_backend.config import EngineConfig, demo_model_folder
from paged_backend.engine.engine import Engine
from paged_backend.engine.loading import load_engine
from paged_backend.messages import Submit
from paged_backend.request import SamplingParams
from tests.oracle import Oracle
from tools.demo_model import exam

NUM_CONVERSATIONS = 3
SEARCHED = 60  # long conversations of the exam, for such as are short enough and whose far questions are answered right
MOST_TOKENS = 1300  # of a conversation, up to the question
QUESTIONS_EACH = 2
NUM_STORIES = 2  # from the first conversations
FAR = 1000  # tokens between fact and answer
STORY = "<|user|>Tell me a story about a fox and a lantern.<|end|><|assistant|>"  # its answer outgrows several pages
MAX_TOKENS = 160
# of a whole answer; a page that is not read changes a story's by 8e-4 at least, wherever it lies
LOGPROB_TOLERANCE = 2e-4
COARSE_TOLERANCE = 6e-2  # the answer that the model is least sure of, at -1.24, moves by 0.027
SPARE_TOKENS = 64  # beyond two conversations: less than their stories take


@dataclass(frozen=True)
class Asked:
    prompts: list[Int32]
    answers: list[list[int]]  # transformers', EOS included
    logprobs: list[float]  # of the whole answers


@pytest.fixture(scope="module")
def asked() -> Asked:
    """Stories, asked for late in conversations, then questions about what was said early. Their answers are the exact
    ones: the model did find the facts.
    """
    folder = demo_model_folder()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    oracle = Oracle(folder)
    found = [
        (sitting.ids, far)
        for sitting in (exam.sitting(tokenizer, each) for each in exam.held_out("long", SEARCHED))
        if (far := [item for item in sitting.items if (item.distance or 0) >= FAR][:QUESTIONS_EACH])
        and far[-1].prompt_len <= MOST_TOKENS
    ]
    known = list(islice((each for each in found if knows(oracle, *each)), NUM_CONVERSATIONS))
    assert len(known) == NUM_CONVERSATIONS, "the model finds far facts no longer"
    story = tuple(tokenizer.encode(STORY, add_special_tokens=False).ids)
    prompts = [ids[: items[0].prompt_len] + items[0].answer_ids + story for ids, items in known[:NUM_STORIES]]
    prompts += [ids[: item.prompt_len] for ids, items in known for item in items]
    answers = oracle.greedy(prompts[:NUM_STORIES], MAX_TOKENS)
    assert all("lantern" in tokenizer.decode(answer) and 60 < len(answer) < MAX_TOKENS for answer in answers)
    answers += [list(item.answer_ids) for _, items in known for item in items]  # greedy as well: it knows them
    logprobs = [
        oracle.logits([*prompt, *answer])[len(prompt) - 1 : -1].log_softmax(-1)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    sums = [float(values[range(len(answer)), answer].sum()) for values, answer in zip(logprobs, answers, strict=True)]
    return Asked([np.array(prompt, np.int32) for prompt in prompts], answers, sums)


def knows(oracle: Oracle, ids: tuple[int, ...], items: list[exam.Item]) -> bool:
    """Whether each token of these answers is the likeliest one after those before it."""
    likeliest = oracle.logits(ids[: items[-1].prompt_len + len(items[-1].answer_ids)]).argmax(-1).tolist()
    return all(
        likeliest[item.prompt_len - 1 : item.prompt_len - 1 + len(item.answer_ids)] == list(item.answer_ids)
        for item in items
    )


def load(folder: Path, **options: object) -> Engine:
    engine, *_ = load_engine(
        EngineConfig.parse(
            {"device": "cpu", "speculation": "off", "max_num_sequences": 16, "max_model_len": 2048, **options}
        ),
        folder,
    )
    return engine


def answers(engine: Engine, prompts: list[Int32]) -> tuple[list[list[int]], list[float]]:
    """The answers' tokens, and the log-probability of each answer."""
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, logprobs=0)
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs = [0.0] * len(prompts)
    for request_id, prompt in enumerate(prompts):
        engine.submit(Submit(request_id, prompt.tobytes(), sampling, (), "", 1e18))
    while not engine.idle:
        for output in engine.step():
            assert output.logprobs is not None
            for request_id, token, logprob in zip(
                output.request_ids.tolist(), output.token_ids.tolist(), output.logprobs.tolist(), strict=True
            ):
                tokens[request_id].append(token)
                logprobs[request_id] += logprob
        engine.check()
    return tokens, logprobs


def check_answers(
    engine: Engine, asked: Asked, which: slice = slice(None), tolerance: float = LOGPROB_TOLERANCE
) -> None:
    tokens, logprobs = answers(engine, asked.prompts[which])
    assert tokens == asked.answers[which]
    assert logprobs == pytest.approx(asked.logprobs[which], rel=0, abs=tolerance)


@pytest.mark.long
@pytest.mark.parametrize(
    ("page_size", "budget"),
    [(16, 100), pytest.param(1, 2048, marks=pytest.mark.long), pytest.param(256, 700, marks=pytest.mark.long)],
)
def test_far_facts_are_found_whatever_the_pages_and_chunks_are(
    asked: Asked, tmp_path: Path, page_size: int, budget: int
) -> None:
    engine = load(tmp_path, page_size=page_size, num_pages=16_384 // page_size, max_batched_tokens=budget)
    check_answers(engine, asked)
    before, again = engine.stats().prefix_hits, slice(NUM_STORIES, None)
    check_answers(engine, asked, again)  # now with what the first round left in the cache
    pages = sum((len(prompt) - 1) // page_size for prompt in asked.prompts[again])
    assert engine.stats().prefix_hits - before == pages * page_size


@pytest.mark.long
@pytest.mark.parametrize(("page_size", "prefix_cache"), [pytest.param(1, False, marks=pytest.mark.long), (16, True)])
def test_far_facts_are_found_after_preemption(asked: Asked, tmp_path: Path, page_size: int, prefix_cache: bool) -> None:
    num_pages = (len(asked.prompts[0]) + len(asked.prompts[1]) + SPARE_TOKENS) // page_size
    engine = load(tmp_path, page_size=page_size, num_pages=num_pages, max_batched_tokens=512, prefix_cache=prefix_cache)
    check_answers(engine, asked)
    assert engine.stats().num_preemptions > 0


def test_a_coarse_kv_store_changes_no_token(asked: Asked, tmp_path: Path) -> None:
    """Of answers with one right wording; a story's next word may hang by a hair."""
    engine = load(tmp_path, page_size=16, num_pages=1024, kv_dtype="bfloat16")
    check_answers(engine, asked, slice(NUM_STORIES, None), tolerance=COARSE_TOLERANCE)
