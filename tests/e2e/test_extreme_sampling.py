"""Wishes at the ends of their ranges, on a vocabulary smaller than most of them count on: no token beyond it is ever
chosen, and the engine lives.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paged_backend.config import EngineConfig
from paged_backend.engine.engine import Engine
from paged_backend.engine.loading import load_engine
from paged_backend.messages import Found, Submit
from paged_backend.request import parse_sampling
from tests.oracle import save_checkpoint

VOCAB = 7
EVERY_TOKEN = tuple((token,) for token in range(VOCAB))
WISHES: dict[str, dict[str, Any]] = {
    "a temperature that float32 rounds to 0": {"temperature": 1e-46},
    "a temperature that makes logits infinite": {"temperature": 1e-40, "top_p": 0.5, "top_k": 3, "min_p": 0.1},
    "a penalty that float32 rounds to 0": {"repetition_penalty": 1e-46, "temperature": 0},
    "a penalty that makes logits infinite": {"repetition_penalty": 1e-40},
    "least top_p": {"top_p": 1e-46},
    "largest min_p": {"min_p": 1.0},
    "top_k beyond the vocabulary": {"top_k": 2**31 - 1},
    "more logprobs than tokens": {"logprobs": 20, "prompt_logprobs": 20},
    "more beams than tokens": {"use_beam_search": True, "beam_width": 16, "n": 16},
    "beams that may all stop": {"use_beam_search": True, "beam_width": 5, "n": 2, "stop_token_ids": list(range(VOCAB))},
    "every token biased away": {"logit_bias": {str(token): -100 for token in range(VOCAB)}},
    "every token a stop id under min_tokens": {"min_tokens": 5, "stop_token_ids": list(range(VOCAB))},
    "every token a bad word": {"seed": 2**64 - 1, "bad_words": ["each"]},
    "hottest, with all penalties": {
        "temperature": 100,
        "frequency_penalty": 2,
        "presence_penalty": -2,
        "repetition_penalty": 100,
    },
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = save_checkpoint(tmp_path_factory.mktemp("checkpoint"), "LlamaForCausalLM", vocab_size=VOCAB)
    options = {"model": str(folder), "device": "cpu", "speculation": "off", "num_pages": 100, "max_model_len": 128}
    return load_engine(EngineConfig.parse(options), tmp_path_factory.mktemp("engine"))[0]


@pytest.mark.parametrize("wish", WISHES.values(), ids=WISHES)
def test_an_extreme_wish_brings_tokens_of_the_vocabulary(engine: Engine, wish: dict[str, Any]) -> None:
    sampling = parse_sampling({"max_tokens": 10, **wish})
    engine.submit(
        Submit(
            1, np.array([1, 2, 3], np.int32).tobytes(), sampling, EVERY_TOKEN if sampling.bad_words else (), "", 1e18
        )
    )
    token_ids, finishes = [], []
    while not engine.idle:
        for output in engine.step():
            token_ids += output.token_ids.tolist()
            for found in output.feature_outputs:
                for sequence in found.sequences if isinstance(found, Found) else ():
                    token_ids += np.frombuffer(sequence.token_ids, np.int32).tolist()
            finishes += output.finishes
    assert [finish.error for finish in finishes] == [None]
    assert token_ids and all(0 <= token_id < VOCAB for token_id in token_ids)
