"""Embeddings: transformers' last hidden states in float32, pooled, however the prompt is cut up, cached, interrupted or
batched.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from paged_backend.config import EngineConfig
from paged_backend.engine.engine import Engine
from paged_backend.engine.loading import load_engine
from paged_backend.errors import EngineError
from paged_backend.messages import PromptEmbedding, Ready, Submit, Tokens, decode_from_engine, encode
from paged_backend.models.pooling_config import recommended_pooling
from paged_backend.request import SamplingParams
from tests.oracle import Oracle, random_prompts, save_checkpoint

TOLERANCE = 1e-5  # of the largest number: float32 sums in another order


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), "Qwen3ForCausalLM", head_dim=16)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


def truth(oracle: Oracle, prompt: np.ndarray, pooling: str) -> np.ndarray:
    with torch.inference_mode():
        states = oracle.model.model(torch.as_tensor(prompt.astype(np.int64))[None]).last_hidden_state[0]
    return (states[-1] if pooling == "last" else states.double().mean(0)).float().numpy()


def load(folder: Path, tmp_path: Path, **options: object) -> tuple[Engine, Ready]:
    engine, _, ready = load_engine(
        EngineConfig.parse(
            {
                "model": str(folder),
                "device": "cpu",
                "speculation": "off",
                "num_pages": 256,
                "max_num_sequences": 16,
                **options,
            }
        ),
        tmp_path,
    )
    return engine, ready


def submit(engine: Engine, request_id: int, prompt: np.ndarray, pooling: str | None) -> None:
    """pooling: None for a prompt that three tokens are generated after."""
    params = SamplingParams(temperature=0.0, max_tokens=3 if pooling is None else 1, pooling=pooling)  # type: ignore[arg-type]
    engine.submit(Submit(request_id, prompt.tobytes(), params, (), "", 1e18))


class Heard:
    def __init__(self) -> None:
        self.embeddings: dict[int, list[np.ndarray]] = {}
        self.token_ids: dict[int, list[int]] = {}
        self.num_cached: dict[int, int] = {}
        self.reasons: dict[int, str] = {}

    def step(self, engine: Engine) -> None:
        for output in engine.step():
            for report in output.feature_outputs:
                assert isinstance(report, PromptEmbedding)
                self.embeddings.setdefault(report.request_id, []).append(np.frombuffer(report.values, np.float32))
            for request_id, token_id in zip(output.request_ids.tolist(), output.token_ids.tolist(), strict=True):
                self.token_ids.setdefault(request_id, []).append(token_id)
            self.num_cached |= output.started
            self.reasons |= {finish.request_id: finish.reason for finish in output.finishes}
        engine.check()

    def drain(self, engine: Engine) -> Heard:
        while not engine.idle:
            self.step(engine)
        return self


def check(oracle: Oracle, heard: Heard, prompts: Sequence[np.ndarray], poolings: Sequence[str | None]) -> None:
    for request_id, (prompt, pooling) in enumerate(zip(prompts, poolings, strict=True)):
        if pooling is None:
            assert heard.token_ids[request_id] == oracle.greedy([prompt], 3)[0] and request_id not in heard.embeddings
            continue
        (found,) = heard.embeddings[request_id]
        expected = truth(oracle, prompt, pooling)
        np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.one_in(2)
@pytest.mark.parametrize("budget", [7, 4096])
@pytest.mark.parametrize("page_size", [1, 16])
def test_they_equal_transformers_beside_answers_and_with_pages_in_the_cache(
    folder: Path, oracle: Oracle, tmp_path: Path, page_size: int, budget: int
) -> None:
    prompts = random_prompts((1, 2, 16, 17, 33, 100, 20, 64))
    prompts.append(np.concatenate([prompts[5][:64], prompts[2]]))
    poolings = ["last", "mean", "mean", "last", None, "last", None, "mean", "mean"]
    engine, _ = load(folder, tmp_path, page_size=page_size, num_pages=1024 // page_size, max_batched_tokens=budget)
    for times in range(2):
        for request_id, (prompt, pooling) in enumerate(zip(prompts, poolings, strict=True)):
            submit(engine, request_id, prompt, pooling)
        heard = Heard().drain(engine)
        check(oracle, heard, prompts, poolings)
        assert all(
            heard.num_cached[request_id] == 0 for request_id, pooling in enumerate(poolings) if pooling == "mean"
        ), "the mean needs all states"
        assert heard.num_cached[5] == (0 if times == 0 else 96 if page_size == 16 else 99), (
            "the last token's state needs the others' pages alone"
        )
    assert engine.stats().num_running == 0


def test_pages_of_a_prompt_that_was_embedded_are_found_by_others(folder: Path, oracle: Oracle, tmp_path: Path) -> None:
    engine, _ = load(folder, tmp_path)
    prompts = random_prompts((60,)) * 3
    for request_id, pooling in enumerate(("mean", None, "last")):
        submit(engine, request_id, prompts[0], pooling)
        heard = Heard().drain(engine)
        assert heard.num_cached[request_id] == (48 if request_id else 0)
        if pooling is not None:
            np.testing.assert_allclose(
                heard.embeddings[request_id][0], truth(oracle, prompts[0], pooling), rtol=0, atol=1e-4
            )


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_preempted_prompt_has_one_embedding_and_the_right_one(
    folder: Path, oracle: Oracle, tmp_path: Path, pooling: str
) -> None:
    prompts = random_prompts((40, 150, 140))
    engine, _ = load(folder, tmp_path, num_pages=30, max_model_len=200, max_batched_tokens=4)
    poolings = [None, pooling, pooling]
    for request_id, prompt in enumerate(prompts):
        submit(engine, request_id, prompt, poolings[request_id])
    heard = Heard()
    for _ in range(40):
        heard.step(engine)
    victim = max(engine._scheduler._running.runners, key=lambda sequence: sequence.spec.arrival_index)
    assert victim.spec.sampling.pooling == pooling
    engine._scheduler._living.preempt(victim)
    check(oracle, heard.drain(engine), prompts, poolings)
    assert engine.stats().num_preemptions > 0


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_request_that_left_is_told_nothing_and_the_others_all(
    folder: Path, oracle: Oracle, tmp_path: Path, steps_ahead: int
) -> None:
    prompts = random_prompts((60, 61, 62, 5))
    engine, _ = load(folder, tmp_path, max_batched_tokens=16)
    engine._steps_ahead = steps_ahead
    for request_id, prompt in enumerate(prompts):
        submit(engine, request_id, prompt, "mean")
    heard = Heard()
    for _ in range(3):
        heard.step(engine)
    engine.abort(0)
    heard.drain(engine)
    assert sorted(heard.embeddings) == [1, 2, 3] and set(heard.reasons) == {1, 2, 3}
    heard.embeddings[0] = [truth(oracle, prompts[0], "mean")]
    check(oracle, heard, prompts, ["mean"] * 4)


def test_steps_without_a_prompt_that_is_embedded_ask_nothing(folder: Path, tmp_path: Path) -> None:
    engine, _ = load(folder, tmp_path)
    sent = []
    launch = engine._runner.launch
    engine._runner.launch = lambda batch: (sent.append(batch), launch(batch))[1]  # type: ignore[method-assign]
    for request_id, pooling in enumerate(("last", None)):
        submit(engine, request_id, random_prompts([20])[0], pooling)
    Heard().drain(engine)
    assert [[len(ask.spans) for ask in batch.asks] for batch in sent] == [[1], [], []]
    assert {batch.features for batch in sent} == {0}  # what captured steps are looked up by


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_of_the_inner_model_alone_is_served_and_makes_no_text(tmp_path: Path, tied: bool) -> None:
    """As Qwen3-Embedding is published: the names lack the prefix, and there is no head."""
    whole = save_checkpoint(tmp_path / "whole", "Qwen3ForCausalLM", head_dim=16, tie_word_embeddings=tied)
    oracle = Oracle(whole)
    prompt = random_prompts([30])[0]
    inner = AutoModel.from_pretrained(whole, dtype=torch.float32)
    inner.save_pretrained(tmp_path / "inner")  # architectures: Qwen3Model
    published = tmp_path / "published"  # architectures: Qwen3ForCausalLM
    published.mkdir()
    (published / "config.json").write_text((whole / "config.json").read_text())
    save_file(
        load_file(tmp_path / "inner" / "model.safetensors"), published / "model.safetensors", metadata={"format": "pt"}
    )
    for folder in (tmp_path / "inner", published):
        engine, ready = load(folder, tmp_path)
        assert not ready.makes_text and ready.embedding_size == 64
        submit(engine, 0, prompt, "last")
        check(oracle, Heard().drain(engine), [prompt], ["last"])
    assert load(whole, tmp_path)[1].makes_text


def test_the_checkpoints_own_pooling_is_known(tmp_path: Path) -> None:
    assert recommended_pooling(tmp_path) == "last"
    (tmp_path / "1_Pooling").mkdir()
    for text, expected in (
        ('{"pooling_mode_mean_tokens": true, "pooling_mode_lasttoken": false}', "mean"),
        ('{"pooling_mode_lasttoken": true, "include_prompt": true}', "last"),
        ('{"pooling_mode_cls_token": true}', "last"),
    ):
        (tmp_path / "1_Pooling" / "config.json").write_text(text)
        assert recommended_pooling(tmp_path) == expected
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": "yes"}')
    with pytest.raises(EngineError, match="pooling_mode_mean_tokens"):
        recommended_pooling(tmp_path)


def test_reports_of_both_kinds_survive_the_way_to_a_front_end() -> None:
    report = PromptEmbedding(7, np.ones(3, np.float32).tobytes())
    assert decode_from_engine(encode(Tokens(b"", b"", feature_outputs=(report,)))).feature_outputs == (report,)
