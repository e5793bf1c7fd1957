"""Engines that search with beams, and what transformers finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paged_backend.arrays import bits
from paged_backend.config import EngineConfig
from paged_backend.engine.engine import Engine
from paged_backend.engine.loading import load_engine
from paged_backend.messages import Finish, Found, Submit
from paged_backend.request import SamplingParams
from tests.oracle import Oracle, save_checkpoint

VOCAB = 199
EOS = (11, 60)  # of the checkpoint: two of them, as Llama 3 has several
LENGTHS = (5, 16, 31, 48)
MAX_TOKENS = 20


Answers = list[tuple[list[int], float]]  # token ids, and total logprob / length ** length_penalty


def save_searched(folder: Path) -> Path:
    """A small random Llama with two tokens that end an answer."""
    return save_checkpoint(
        folder, "LlamaForCausalLM", eos_token_id=list(EOS), initializer_range=0.08, num_hidden_layers=2
    )


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
        "speculation": "off",
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
