"""allowed_token_ids: what may be asked, what the sampler then chooses from, and that nothing waits for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from paged_backend.arrays import bits
from paged_backend.batch import Feature
from paged_backend.config import EngineConfig
from paged_backend.engine.engine import Engine
from paged_backend.engine.loading import load_engine
from paged_backend.errors import RequestError
from paged_backend.frontend.prompt import PromptReader
from paged_backend.messages import Found, Ready, Submit
from paged_backend.request import MAX_ALLOWED_TOKENS, Outputs, Request, SamplingParams, parse_sampling
from tests.oracle import Oracle, random_prompts, save_checkpoint
from tests.structured_engine import EOS as SPEAKER_EOS
from tests.structured_engine import PROMPT, TOKENIZER, Ended, drain, load_speaker, save_speaker
from tests.structured_engine import VOCAB as SPEAKER_VOCAB

VOCAB = 199
EOS = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), "Qwen3ForCausalLM", head_dim=16, eos_token_id=EOS)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


def load(folder: Path, tmp_path: Path, **options: object) -> Engine:
    engine, *_ = load_engine(
        EngineConfig.parse(
            {
                "model": str(folder),
                "device": "cpu",
                "speculation": "off",
                "num_pages": 128,
                "max_num_sequences": 16,
                **options,
            }
        ),
        tmp_path,
    )
    return engine


def submit_of(
    request_id: int,
    prompt: np.ndarray,
    allowed: list[int],
    bad_words: tuple[tuple[int, ...], ...] = (),
    **sampling: object,
) -> Submit:
    params = SamplingParams(**({"temperature": 0.0, "max_tokens": 10} | sampling))  # type: ignore[arg-type]
    return Submit(
        request_id,
        prompt.tobytes(),
        params,
        bad_words,
        "",
        1e18,
        allowed=bits(allowed, VOCAB).tobytes() if allowed else b"",
    )


def greedy(
    oracle: Oracle,
    prompt: np.ndarray,
    allowed: list[int],
    max_tokens: int = 10,
    banned: tuple[int, ...] = (),
    min_tokens: int = 0,
) -> list[int]:
    """A plain loop over the model's logits."""
    tokens: list[int] = []
    while len(tokens) < max_tokens and tokens[-1:] != [EOS]:
        logits = oracle.logits([*prompt.tolist(), *tokens])[-1]
        mask = torch.full_like(logits, -torch.inf)
        mask[
            [
                token
                for token in allowed or range(VOCAB)
                if token not in banned and (token != EOS or len(tokens) >= min_tokens)
            ]
        ] = 0
        tokens.append(int((logits + mask).argmax()))
    return tokens


def test_ids_are_checked_against_count_and_vocabulary(tmp_path: Path) -> None:
    assert parse_sampling({"allowed_token_ids": ["5", 6]}).allowed_token_ids == (5, 6)
    for given, message in {
        (): "array of length >= 1, got 0 entries",
        (-1,): "allowed_token_ids",
        tuple(range(MAX_ALLOWED_TOKENS + 1)): "65536",
    }.items():
        with pytest.raises(RequestError, match=message):
            parse_sampling({"allowed_token_ids": list(given)})
    reader = PromptReader(EngineConfig(), Ready(None, VOCAB, 64, 1024, 16, 64))

    def read(*token_ids: int) -> np.ndarray | None:
        sampling = SamplingParams(allowed_token_ids=token_ids)
        return reader.read(
            Request(
                text=None,
                input_ids=np.array([1]),
                sampling=sampling,
                outputs=Outputs(),
                stream=True,
                prepend_prompt=False,
                arrival=0.0,
            )
        ).allowed

    words = read(0, 33, VOCAB - 1)
    assert words is not None and len(words) == 7
    assert [token for token in range(7 * 32) if words[token // 32] >> token % 32 & 1] == [0, 33, VOCAB - 1]
    with pytest.raises(RequestError, match="allowed_token_ids: 199 is not a token of this model; its ids are 0 to 198"):
        read(3, VOCAB)
    reader.close()


def test_greedy_answers_are_the_models_likeliest_allowed_tokens(folder: Path, oracle: Oracle, tmp_path: Path) -> None:
    """Beside each other, with every feature that takes tokens away, and beside one that may say anything; in chunks, so
    that rows wait unsampled.
    """
    prompts = random_prompts((5, 40, 17, 9, 23, 30))
    few, many = [3, 50, 98], list(range(0, VOCAB, 3))
    cases = [(few, {}), (many, {"min_tokens": 6}), ([EOS, 11], {"min_tokens": 3}), (many, {}), ([], {}), ([64], {})]
    words: list[tuple[tuple[int, ...], ...]] = [(), (), (), tuple((token,) for token in many[:60]), (), ()]
    engine = load(folder, tmp_path, max_batched_tokens=24)
    for request_id, (prompt, (allowed, sampling), bad_words) in enumerate(zip(prompts, cases, words, strict=True)):
        engine.submit(submit_of(request_id, prompt, allowed, bad_words, **sampling))
    ended = drain(engine, len(prompts))
    for prompt, (allowed, sampling), bad_words, got in zip(prompts, cases, words, ended, strict=True):
        banned = tuple(word[0] for word in bad_words)
        assert got.token_ids == greedy(oracle, prompt, allowed, banned=banned, **sampling)


def test_two_beams_of_one_token_tell_the_log_probabilities_of_two_tokens_in_the_whole_vocabulary(
    folder: Path, oracle: Oracle, tmp_path: Path
) -> None:
    """What a reranker asks (client/openai/ranking_api.py): which of "yes" and "no", and how likely."""
    prompts, pair = random_prompts((9, 30)), [100, 7]
    engine = load(folder, tmp_path)
    for request_id, prompt in enumerate(prompts):
        engine.submit(
            submit_of(
                request_id,
                prompt,
                pair,
                use_beam_search=True,
                beam_width=2,
                n=2,
                max_tokens=1,
                logprobs=0,
                ignore_eos=True,
            )
        )
    found = {}
    while not engine.idle:
        for output in engine.step():
            found |= {one.request_id: one.sequences for one in output.feature_outputs if isinstance(one, Found)}
    for request_id, prompt in enumerate(prompts):
        truth = torch.log_softmax(oracle.logits(prompt)[-1], -1)
        scores = {
            int(np.frombuffer(one.token_ids, np.int32)[0]): float(np.frombuffer(one.logprobs, np.float32)[0])
            for one in found[request_id]
        }
        assert scores == {token_id: pytest.approx(float(truth[token_id]), abs=1e-4) for token_id in pair}


def test_bias_and_penalties_choose_among_the_allowed(folder: Path, tmp_path: Path) -> None:
    prompt = random_prompts([12])[0]
    engine = load(folder, tmp_path)
    allowed = list(range(20, 60))
    engine.submit(submit_of(0, prompt, allowed, logit_bias={33: 90.0, 5: 100.0}))
    engine.submit(submit_of(1, prompt, [21, 22, 23], max_tokens=6, frequency_penalty=2.0, repetition_penalty=50.0))
    engine.submit(submit_of(2, prompt, allowed, temperature=3.0, top_k=30, top_p=0.95, seed=4, max_tokens=60))
    biased, penalised, drawn = drain(engine, 3)
    assert set(biased.token_ids) == {33}
    assert set(penalised.token_ids) == {21, 22, 23}
    assert set(drawn.token_ids) <= set(allowed) and len(set(drawn.token_ids)) > 10


def test_preemption_keeps_the_allowed_tokens(folder: Path, oracle: Oracle, tmp_path: Path) -> None:
    prompts = random_prompts((30, 31, 33, 29))
    allowed = list(range(0, VOCAB, 5))
    engine = load(folder, tmp_path, num_pages=9, max_model_len=100)
    for request_id, prompt in enumerate(prompts):
        engine.submit(submit_of(request_id, prompt, allowed, max_tokens=40))
    assert [got.token_ids for got in drain(engine, 4)] == [greedy(oracle, prompt, allowed, 40) for prompt in prompts]
    assert engine.stats().num_preemptions > 0


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_no_step_waits_for_the_result_of_the_step_before(folder: Path, tmp_path: Path, steps_ahead: int) -> None:
    """As sequences do that follow a grammar; the mask is sent once."""
    engine = load(folder, tmp_path, speculation="off")
    engine._steps_ahead = steps_ahead
    sent = []
    launch = engine._runner.launch
    engine._runner.launch = lambda batch: (sent.append(batch), launch(batch))[1]  # type: ignore[method-assign]
    engine.submit(submit_of(0, random_prompts([6])[0], [1, 2, 3], max_tokens=12))
    drain(engine, 1)
    assert len(sent) == 12  # a step a token
    assert engine.num_steps == 12
    assert all(batch.features & Feature.MASK for batch in sent)
    assert [len(batch.asks) for batch in sent] == [1] + [0] * 11
    assert [len(batch.new_rows) for batch in sent] == [1] + [0] * 11


@pytest.mark.parametrize(
    ("allowed", "bad_words", "sampling", "message"),
    [
        (
            [EOS],
            (),
            {"min_tokens": 2},
            "allowed_token_ids and min_tokens: every allowed token would end the answer before 2 tokens",
        ),
        ([4, 5], ((4,), (9, 5)), {}, "allowed_token_ids and bad_words: every allowed token may be banned"),
        ([4, EOS], ((4,),), {"min_tokens": 1}, "allowed_token_ids and min_tokens"),
    ],
    ids=["stop ids only", "bad words only", "both"],
)
def test_a_request_that_could_be_left_without_a_token_is_refused(
    folder: Path,
    tmp_path: Path,
    allowed: list[int],
    bad_words: tuple[tuple[int, ...], ...],
    sampling: dict[str, int],
    message: str,
) -> None:
    engine = load(folder, tmp_path)
    engine.submit(submit_of(0, random_prompts([6])[0], allowed, bad_words, **sampling))
    (ended,) = drain(engine, 1)
    assert ended.finish is not None and ended.finish.message.startswith(message)


# ---- together with a grammar


def say(tmp_path: Path, allowed: str, **sampling: object) -> Ended:
    """One answer of a model that speaks the byte-level tokenizer's language. allowed: the characters it may use."""
    pytest.importorskip("xgrammar")
    engine = load_speaker(save_speaker(tmp_path / "speaker"), tmp_path / "exports")
    ids = [
        token_id
        for token, token_id in TOKENIZER.get_vocab().items()
        if set(TOKENIZER.decode([token_id])) <= set(allowed) and token_id != SPEAKER_EOS
    ]
    params = parse_sampling({"max_tokens": 40, "seed": 3, **sampling})
    engine.submit(
        Submit(
            0, np.array(PROMPT, np.int32).tobytes(), params, (), "", 1e18, allowed=bits(ids, SPEAKER_VOCAB).tobytes()
        )
    )
    (ended,) = drain(engine, 1)
    return ended


def test_a_grammars_tokens_and_the_allowed_ones_are_both_kept_to_and_the_end_stays_possible(tmp_path: Path) -> None:
    ended = say(tmp_path, "abc123", guided_regex="[a-z]{3}[0-9]{3}")
    assert ended.reason == "stop"
    assert set(ended.text[:3]) <= set("abc") and set(ended.text[3:]) <= set("123") and len(ended.text) == 6


def test_a_grammar_that_the_allowed_tokens_cannot_follow_is_refused_by_name(tmp_path: Path) -> None:
    ended = say(tmp_path, "123", guided_regex="[a-z]{3}")
    assert ended.reason == "guided_regex: it allows no token of this model among allowed_token_ids"
