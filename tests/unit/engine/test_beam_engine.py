"""Beam search in the whole engine, without a server: the answers are those of transformers' generate, whatever happens
to rows and pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paged_backend.arrays import bits
from paged_backend.config import EngineConfig
from paged_backend.engine.engine import Engine
from paged_backend.engine.loading import load_engine
from paged_backend.errors import ErrorKind
from paged_backend.messages import Finish, Found, Submit
from paged_backend.request import SamplingParams
from tests.adapter_oracle import AdapterOracle, save_adapter
from tests.oracle import Oracle, random_prompts, save_checkpoint

VOCAB = 199
EOS = (11, 60)  # of the checkpoint: two of them, as Llama 3 has several
LENGTHS = (5, 16, 31, 48)
MAX_TOKENS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(
        tmp_path_factory.mktemp("checkpoint"),
        "LlamaForCausalLM",
        eos_token_id=list(EOS),
        initializer_range=0.08,
        num_hidden_layers=2,
    )


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


Answers = list[tuple[list[int], float]]  # token ids, and total logprob / length ** length_penalty


def truth(
    oracle: Oracle,
    prompt: np.ndarray,
    width: int,
    n: int,
    stop_ids: Sequence[int] = EOS,
    max_tokens: int = MAX_TOKENS,
    **options: Any,
) -> Answers:
    ids = torch.as_tensor(prompt.astype(np.int64))[None]
    with torch.inference_mode():
        out = oracle.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=width,
            num_return_sequences=n,
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=VOCAB - 1,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )
    answers = []
    for tokens, score in zip(out.sequences[:, len(prompt) :].tolist(), out.sequences_scores.tolist(), strict=True):
        ends = [at for at, token in enumerate(tokens) if token in stop_ids]
        answers.append((tokens[: ends[0] + 1] if ends else tokens, score))
    return answers


def load(folder: Path, tmp_path: Path, **options: object) -> Engine:
    given = {
        "model": str(folder),
        "device": "cpu",
        "num_pages": 256,
        "max_num_sequences": 24,
        "max_model_len": 160,
        **options,
    }
    engine, *_ = load_engine(EngineConfig.parse(given), tmp_path)
    return engine


class Caller:
    """Submits, steps, and checks the pool after every step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.found: dict[int, Found] = {}
        self.finishes: dict[int, Finish] = {}
        self.tokens: dict[int, list[int]] = {}
        self.started: dict[int, int] = {}

    def ask(self, request_id: int, prompt: np.ndarray, width: int = 4, n: int = 1, **options: Any) -> None:
        """A width of 0: greedy."""
        params = (
            {"max_tokens": MAX_TOKENS, "temperature": 0.0}
            | ({"use_beam_search": True, "beam_width": width, "n": n} if width else {})
            | options
        )
        allowed = params.pop("allowed", None)
        bad_words = params.pop("words", ())
        words = b"" if allowed is None else bits(allowed, VOCAB).tobytes()
        self.engine.submit(
            Submit(request_id, prompt.tobytes(), SamplingParams(**params), bad_words, "", 1e18, allowed=words)
        )

    def step(self) -> None:
        for output in self.engine.step():
            self.found |= {found.request_id: found for found in output.feature_outputs if isinstance(found, Found)}
            self.finishes |= {finish.request_id: finish for finish in output.finishes}
            self.started |= output.started
            assert (output.request_ids >= 0).all()
            for request_id, token in zip(output.request_ids.tolist(), output.token_ids.tolist(), strict=True):
                self.tokens.setdefault(request_id, []).append(token)
        self.engine.check()

    def run(self, after_step: Callable[[], None] = lambda: None) -> None:
        for _ in range(3000):
            if self.engine.idle:
                break
            self.step()
            after_step()
        assert self.engine.idle, "the engine does not come to rest"
        pool = self.engine._scheduler.pool
        assert pool.num_held == 0

    def answers(self, request_id: int, length_penalty: float = 1.0) -> Answers:
        answers = []
        for sequence in self.found[request_id].sequences:
            tokens, logprobs = np.frombuffer(sequence.token_ids, np.int32), np.frombuffer(sequence.logprobs, np.float32)
            assert len(tokens) == len(logprobs)
            assert sequence.stopped == (tokens[-1] in EOS)
            answers.append((tokens.tolist(), float(logprobs.sum() / len(tokens) ** length_penalty)))
        return answers


def same(mine: Answers, theirs: Answers) -> None:
    assert [tokens for tokens, _ in mine] == [tokens for tokens, _ in theirs]
    np.testing.assert_allclose([score for _, score in mine], [score for _, score in theirs], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_answers_are_those_of_transformers(
    folder: Path, oracle: Oracle, tmp_path: Path, length_penalty: float, early_stopping: Any
) -> None:
    """Widths 2, 4 and 8 beside each other and beside greedy requests."""
    prompts = random_prompts(LENGTHS)[::3]
    caller = Caller(load(folder, tmp_path, max_num_sequences=64))
    options = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    asked = [(width, prompt) for width in (2, 4, 8) for prompt in prompts]
    for request_id, (width, prompt) in enumerate(asked):
        caller.ask(request_id, prompt, width, width, **options)
    for number, prompt in enumerate(prompts):
        caller.ask(100 + number, prompt, 0)
    caller.run()
    lengths = set()
    for request_id, (width, prompt) in enumerate(asked):
        same(caller.answers(request_id, length_penalty), truth(oracle, prompt, width, width, **options))
        lengths |= {len(tokens) for tokens, _ in caller.answers(request_id)}
        assert caller.finishes[request_id].reason in ("stop", "length")
    assert length_penalty > 1 or len(lengths) > 3, "EOS is never chosen: this tests little"
    assert [caller.tokens[100 + number] for number in range(len(prompts))] == oracle.greedy(prompts, MAX_TOKENS)


@pytest.mark.parametrize("prefix_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize(("page_size", "budget"), [(1, 64), (4, 17), (64, 4096)])
def test_pages_chunks_and_cache_change_no_answer(
    folder: Path, oracle: Oracle, tmp_path: Path, page_size: int, budget: int, prefix_cache: bool
) -> None:
    prompts = random_prompts(LENGTHS)
    caller = Caller(
        load(
            folder,
            tmp_path,
            page_size=page_size,
            num_pages=2048 // page_size,
            max_batched_tokens=budget,
            prefix_cache=prefix_cache,
        )
    )
    for turn in range(2):
        for number, prompt in enumerate(prompts):
            caller.ask(10 * turn + number, prompt, 4, 2)
        caller.run()
        for number, prompt in enumerate(prompts):
            same(caller.answers(10 * turn + number), truth(oracle, prompt, 4, 2))
    assert (caller.started[13] > 0) == (prefix_cache and page_size < 48)


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_steps_launched_ahead_change_no_answer_and_others_go_on_meanwhile(
    folder: Path, oracle: Oracle, tmp_path: Path, steps_ahead: int
) -> None:
    prompts = random_prompts(LENGTHS)
    engine = load(folder, tmp_path)
    engine._steps_ahead = steps_ahead
    caller = Caller(engine)
    caller.ask(0, prompts[0], 4, 4)
    caller.ask(1, prompts[1], 0)
    caller.ask(2, prompts[2], 8, 3)
    caller.run()
    same(caller.answers(0), truth(oracle, prompts[0], 4, 4))
    same(caller.answers(2), truth(oracle, prompts[2], 8, 3))
    assert caller.tokens[1] == oracle.greedy(prompts, MAX_TOKENS)[1]


OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # ours, and transformers'
    "min_tokens": ({"min_tokens": 9}, {"min_new_tokens": 9}),
    "bad words": ({"words": ((156,), (29, 91))}, {"bad_words_ids": [[156], [29, 91]]}),  # some that it would say
    "no eos": ({"ignore_eos": True}, {"stop_ids": ()}),
    "more stop ids": ({"stop_token_ids": (3, 77, 140)}, {"stop_ids": (*EOS, 3, 77, 140)}),
    "one token": ({"max_tokens": 1}, {"max_tokens": 1}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_what_takes_tokens_away_or_ends_answers_does_it_for_beams(
    folder: Path, oracle: Oracle, tmp_path: Path, name: str
) -> None:
    mine, theirs = OPTIONS[name]
    prompts = random_prompts(LENGTHS)
    caller = Caller(load(folder, tmp_path))
    for number, prompt in enumerate(prompts):
        caller.ask(number, prompt, 4, 4, **mine)
    caller.run()
    for number, prompt in enumerate(prompts):
        expected = truth(oracle, prompt, 4, 4, **theirs)
        found = caller.found[number].sequences
        same(
            [
                (np.frombuffer(one.token_ids, np.int32).tolist(), float(np.frombuffer(one.logprobs, np.float32).mean()))
                for one in found
            ],
            expected,
        )


def test_beams_say_allowed_tokens_only(folder: Path, oracle: Oracle, tmp_path: Path) -> None:
    """Two tokens, and more beams than that: they become as many as there are answers."""
    prompt = random_prompts([16])[0]  # ends with a page
    allowed = [5, 90]
    caller = Caller(load(folder, tmp_path))
    caller.ask(0, prompt, 6, 6, allowed=allowed, max_tokens=5)
    caller.run()
    scores: dict[tuple[int, ...], float] = {(): 0.0}
    for _ in range(5):
        scores = {
            (*tokens, token): total
            + float(torch.log_softmax(oracle.logits([*prompt.tolist(), *tokens])[-1], -1)[token])
            for tokens, total in scores.items()
            for token in allowed
        }
        scores = dict(sorted(scores.items(), key=lambda item: -item[1])[:6])
    same(caller.answers(0), [(list(tokens), total / 5) for tokens, total in scores.items()])


def test_answers_that_do_not_exist_are_an_error(folder: Path, tmp_path: Path) -> None:
    caller = Caller(load(folder, tmp_path))
    caller.ask(0, random_prompts([9])[0], 4, 3, allowed=[5], max_tokens=6)
    caller.ask(1, random_prompts([9])[0], 4, 1, allowed=[5], max_tokens=6)
    caller.run()
    assert caller.finishes[0].error is ErrorKind.INVALID
    assert caller.finishes[0].message == "n: 3 answers are asked for, and only 1 are possible with what is banned"
    assert caller.answers(1)[0][0] == [5] * 6


def test_prompt_logprobs_come_with_beams(folder: Path, oracle: Oracle, tmp_path: Path) -> None:
    prompt = random_prompts([40])[0]
    engine = load(folder, tmp_path, max_batched_tokens=16)
    caller = Caller(engine)
    caller.ask(3, prompt, 3, prompt_logprobs=0)
    told = [piece for _ in range(3) for output in engine.step() for piece in output.feature_outputs]
    caller.run()
    expected = torch.log_softmax(oracle.logits(prompt), -1)[torch.arange(39), torch.tensor(prompt[1:].astype(np.int64))]
    np.testing.assert_allclose(
        np.concatenate([np.frombuffer(piece.logprobs, np.float32) for piece in told]), expected.numpy(), atol=1e-4
    )
    assert {piece.request_id for piece in told} == {3}
    same(caller.answers(3), truth(oracle, prompt, 3, 1))


# ---- what happens to pages


@pytest.mark.parametrize("preempted", [False, True])
def test_beams_have_the_adapter_of_their_request(folder: Path, oracle: Oracle, tmp_path: Path, preempted: bool) -> None:
    adapted = AdapterOracle(folder, save_adapter(tmp_path / "adapters" / "small", folder, seed=3))
    prompt = random_prompts([31])[0]
    expected = truth(adapted, prompt, 4, 4)
    assert expected != truth(oracle, prompt, 4, 4)
    engine = load(folder, tmp_path, page_size=4, lora_directory=str(tmp_path / "adapters"), max_loras=1)
    caller = Caller(engine)
    caller.ask(0, prompt, 4, 4)
    caller.ask(1, prompt, 4, 4, lora_name="small")
    scheduler = engine._scheduler
    other = next(sequence for sequence in scheduler.sequences if sequence.request_id == 1)
    while scheduler.num_tokens(other) < len(prompt) + 4:
        caller.step()
    if preempted:
        scheduler._living.preempt(other)
    caller.run()
    same(caller.answers(0), truth(oracle, prompt, 4, 4))
    same(caller.answers(1), expected)


def test_full_pages_are_shared_and_partial_ones_are_not(folder: Path, tmp_path: Path) -> None:
    engine = load(folder, tmp_path, page_size=4, num_pages=64)
    caller = Caller(engine)
    caller.ask(0, random_prompts([41])[0], 4, max_tokens=3, ignore_eos=True)
    caller.step()
    caller.step()
    pool = engine._scheduler.pool
    assert pool.num_held == 10 + 4  # ten full pages of the prompt once, and what each beam writes
    assert sorted(pool.count(page) for page in range(64) if pool.count(page))[-10:] == [4] * 10
    caller.run()


@pytest.mark.parametrize("prefix_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize(("page_size", "num_pages"), [(1, 160), (4, 44)])
def test_preemption_changes_no_answer(
    folder: Path, oracle: Oracle, tmp_path: Path, page_size: int, num_pages: int, prefix_cache: bool
) -> None:
    prompts = random_prompts((33, 45, 30, 20))
    caller = Caller(
        load(
            folder,
            tmp_path,
            page_size=page_size,
            num_pages=num_pages,
            max_model_len=200,
            max_batched_tokens=96,
            prefix_cache=prefix_cache,
        )
    )
    caller.ask(0, prompts[0], 0, max_tokens=60, ignore_eos=True)
    for number in (1, 2, 3):
        caller.ask(number, prompts[number], 3, 3, ignore_eos=True, max_tokens=30)
    caller.run()
    for number in (1, 2, 3):
        expected = truth(oracle, prompts[number], 3, 3, (), 30)
        found = caller.found[number].sequences
        same(
            [
                (np.frombuffer(one.token_ids, np.int32).tolist(), float(np.frombuffer(one.logprobs, np.float32).mean()))
                for one in found
            ],
            expected,
        )
    assert caller.engine.stats().num_preemptions > 0


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_preemption_at_any_step_changes_no_answer(
    folder: Path, oracle: Oracle, tmp_path: Path, steps_ahead: int
) -> None:
    prompt = random_prompts([21])[0]
    expected = truth(oracle, prompt, 4, 4)
    engine = load(folder, tmp_path, page_size=4, max_batched_tokens=12, prefix_cache=False)
    engine._steps_ahead = steps_ahead
    for moment in range(1, 14):
        caller = Caller(engine)
        caller.ask(moment, prompt, 4, 4)
        for _ in range(moment):
            caller.step()
        if not engine.idle and engine._scheduler.num_running:
            engine._scheduler._living.preempt(engine._scheduler.sequences[0])
            engine.check()
        caller.run()
        same(caller.answers(moment), expected)


def test_without_preemption_a_search_starts_only_when_all_its_pages_are_there(
    folder: Path, oracle: Oracle, tmp_path: Path
) -> None:
    prompts = random_prompts((30, 33, 21))
    caller = Caller(load(folder, tmp_path, page_size=4, num_pages=36, max_model_len=100, preemption=False))
    for number, prompt in enumerate(prompts):
        caller.ask(number, prompt, 4, 4)
    caller.run()
    for number, prompt in enumerate(prompts):
        same(caller.answers(number), truth(oracle, prompt, 4, 4))
    assert caller.engine.stats().num_preemptions == 0


@pytest.mark.parametrize("spare", [0, -1], ids=["just enough", "one page too few"])
def test_a_search_needs_no_page_more_than_it_is_admitted_for(
    folder: Path, oracle: Oracle, tmp_path: Path, spare: int
) -> None:
    """Prompt of 21: five full pages, shared; 40 tokens are computed, ten pages each."""
    prompt = random_prompts([21])[0]
    caller = Caller(load(folder, tmp_path, page_size=4, num_pages=5 + 4 * 5 + spare, max_model_len=64))
    caller.ask(0, prompt, 4, 4, max_tokens=20, ignore_eos=True)
    caller.run()
    if spare < 0:
        assert caller.finishes[0].error is ErrorKind.INVALID
        assert caller.finishes[0].message == "beam_width: 4 beams of up to 41 tokens may need 25 pages; the pool has 24"
        return
    expected = truth(oracle, prompt, 4, 4, (), 20)
    found = caller.found[0].sequences
    same(
        [
            (np.frombuffer(one.token_ids, np.int32).tolist(), float(np.frombuffer(one.logprobs, np.float32).mean()))
            for one in found
        ],
        expected,
    )
    assert caller.engine.stats().num_preemptions == 0


def test_more_beams_than_may_run_are_refused_with_the_limit(folder: Path, tmp_path: Path) -> None:
    caller = Caller(load(folder, tmp_path, max_num_sequences=6))
    caller.ask(0, random_prompts([9])[0], 8)
    caller.run()
    assert (
        caller.finishes[0].message
        == "beam_width: 8 beams are more than may run at once: 6 (max_num_sequences, max_batched_tokens)"
    )


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_leaving_at_any_step_frees_everything(folder: Path, oracle: Oracle, tmp_path: Path, steps_ahead: int) -> None:
    """Of two searches one leaves: waiting, in the prompt, between forks; the other's answers stay right."""
    prompts = random_prompts((21, 30))
    expected = truth(oracle, prompts[1], 3, 3)
    engine = load(folder, tmp_path, page_size=4, max_batched_tokens=12)
    engine._steps_ahead = steps_ahead
    for moment in range(0, 12, 2 - steps_ahead):
        caller = Caller(engine)
        caller.ask(2 * moment, prompts[0], 4, 4)
        caller.ask(2 * moment + 1, prompts[1], 3, 3)
        for _ in range(moment):
            caller.step()
        engine.abort(2 * moment)
        engine.check()
        caller.run()
        assert 2 * moment not in caller.found or moment > 8
        same(caller.answers(2 * moment + 1), expected)


def test_a_deadline_ends_a_search(folder: Path, tmp_path: Path) -> None:
    engine = load(folder, tmp_path)
    now = [0.0]
    engine._scheduler._clock = engine._scheduler._deadlines._clock = lambda: now[0]
    caller = Caller(engine)
    params = SamplingParams(
        use_beam_search=True, beam_width=4, temperature=0.0, max_tokens=20, ignore_eos=True, request_deadline_seconds=5
    )
    engine.submit(Submit(0, random_prompts([9])[0].tobytes(), params, (), "", 0.0))
    for _ in range(4):
        caller.step()
    now[0] = 6.0
    caller.run()
    assert caller.finishes[0].error is ErrorKind.CANCELLED
    assert not caller.found
