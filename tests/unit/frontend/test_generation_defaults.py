"""What generation_config.json recommends goes to requests that leave it open, if the operator or the request wants
it.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paged_backend.config import EngineConfig
from paged_backend.engine.loading import load_engine
from paged_backend.errors import EngineError, RequestError
from paged_backend.frontend.generation_defaults import GenerationDefaults
from paged_backend.frontend.request_reader import read_request
from paged_backend.models.generation_config import GenerationConfig, recommended_sampling
from paged_backend.request import SamplingParams
from tests.oracle import save_checkpoint

VALUES = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.05, "max_tokens": 50}


def sampling(defaults: GenerationDefaults, parameters: dict[str, Any] | None = None, **options: Any) -> SamplingParams:
    tensors = {
        "text_input": np.array([b"a"], np.object_),
        "sampling_parameters": np.array([json.dumps(options).encode()], np.object_),
    }
    return read_request(tensors, json.dumps(parameters or {}), 0.0, defaults).sampling


@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
@pytest.mark.parametrize("said", [None, True, False, "true", "False"])
def test_the_requests_own_say_wins_over_the_tunable(on: bool, said: Any) -> None:
    made = sampling(GenerationDefaults(VALUES, on), generation_defaults=said)
    wanted = on if said is None else str(said).lower() == "true"
    assert made == (SamplingParams(**VALUES) if wanted else SamplingParams())


def test_what_a_request_names_is_its_own() -> None:
    made = sampling(
        GenerationDefaults(VALUES, on=True), {"top_p": 1.0, "top_k": 5}, temperature=0, top_k=-1, max_tokens=None
    )
    assert made == SamplingParams(**{**VALUES, "temperature": 0.0, "top_k": -1, "top_p": 1.0})


def test_a_parameter_of_the_request_says_it_too() -> None:
    assert sampling(GenerationDefaults(VALUES), {"generation_defaults": True}) == SamplingParams(**VALUES)


def test_a_beam_search_takes_the_length_alone() -> None:
    made = sampling(GenerationDefaults(VALUES, on=True), use_beam_search=True, beam_width=2)
    assert (made.max_tokens, made.top_k, made.repetition_penalty) == (50, 0, 1.0)


def test_nobody_is_refused_for_a_length_that_somebody_else_chose() -> None:
    assert sampling(GenerationDefaults(VALUES, on=True), min_tokens=60).max_tokens is None


def test_a_say_that_is_neither_is_refused() -> None:
    with pytest.raises(RequestError, match="generation_defaults: expected true or false, got 'auto'"):
        sampling(GenerationDefaults(VALUES), generation_defaults="auto")


def test_generation_config_is_read_as_vllm_reads_it() -> None:
    generation = GenerationConfig.model_validate({**VALUES, "max_new_tokens": 2048, "do_sample": False, "num_beams": 4})
    assert recommended_sampling(generation, 1000) == ({**VALUES, "max_tokens": 1000}, [])


def test_values_out_of_range_are_left_out_with_a_warning() -> None:
    values, warnings = recommended_sampling(GenerationConfig(temperature=-1.0, top_p=0.9), 1000)
    assert values == {"top_p": 0.9}
    assert len(warnings) == 1
    assert "generation_config.json: temperature" in warnings[0]


@pytest.mark.parametrize("on", [True, False], ids=["on", "off"])
def test_the_engine_tells_front_ends_and_the_log(on: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_checkpoint(tmp_path / "checkpoint", "LlamaForCausalLM", num_hidden_layers=1)
    (folder / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "top_k": 20, "eos_token_id": [7, 9]})
    )
    caplog.set_level(logging.INFO, "paged")
    config = EngineConfig(model=str(folder), device="cpu", num_pages=16, generation_defaults=on)
    _, _, ready = load_engine(config, tmp_path)
    assert ready.sampling == {"temperature": 0.6, "top_k": 20}
    lines = [record.getMessage() for record in caplog.records]
    assert any(
        line.endswith(f"(generation_defaults={'on' if on else 'off'}): temperature 0.6, top_k 20") for line in lines
    )
    assert any("answers end at 7 (generation_config.json), 9 (generation_config.json)" in line for line in lines)


def test_a_value_of_a_wrong_type_is_refused_at_load(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": "0.6"}))
    with pytest.raises(EngineError, match=r'generation_config\.json: temperature: expected a number, got "0\.6"'):
        GenerationConfig.read(tmp_path)
