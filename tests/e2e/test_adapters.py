"""The whole engine with adapters, without a server: every sequence's tokens and logits are those that PEFT gives alone,
whoever shares its steps.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paged_backend.config import EngineConfig
from paged_backend.engine.engine import Engine
from paged_backend.engine.loading import load_engine
from paged_backend.errors import EngineError
from paged_backend.messages import Finish, Submit
from paged_backend.request import SamplingParams, parse_sampling
from paged_backend.scheduler.adapter_slots import AdapterSlots
from tests.adapter_oracle import AdapterOracle, save_adapter
from tests.oracle import Oracle, random_prompts, save_checkpoint
from tests.structured_engine import load_speaker, run, save_speaker

MAX_TOKENS = 14
LENGTHS = [1, 17, 40, 5, 64, 33]
ADAPTERS: dict[str, dict[str, Any]] = {
    "all of rank 4": {"rank": 4, "lora_alpha": 8},
    "attention, rank 9": {"rank": 9, "lora_alpha": 3, "targets": ("q_proj", "v_proj", "o_proj")},
    "mlp, rank 1": {"rank": 1, "lora_alpha": 2, "targets": ("gate_proj", "down_proj")},
    "stabilised, rank 16": {"rank": 16, "lora_alpha": 4, "use_rslora": True, "dtype": torch.bfloat16},
    "patterns": {
        "rank": 3,
        "lora_alpha": 6,
        "rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 2},
        "alpha_pattern": {"q_proj": 20},
    },
    "some layers": {"rank": 2, "lora_alpha": 4, "layers_to_transform": [1], "targets": ("k_proj", "up_proj")},
}
CHECKPOINTS = {
    "llama, biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "qwen3, tied": ("Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
}


def save_all(root: Path, kind: str) -> Path:
    """The checkpoint's folder; its adapters lie beside it."""
    architecture, options = CHECKPOINTS[kind]
    folder = save_checkpoint(root / "model", architecture, num_hidden_layers=2, **options)
    for seed, (name, adapter) in enumerate(ADAPTERS.items()):
        save_adapter(root / "adapters" / name, folder, seed, **adapter)
    return folder


@pytest.fixture(scope="module", params=CHECKPOINTS)
def any_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("any"), request.param)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_all(tmp_path_factory.mktemp("one"), "llama, biases")


def adapters_of(folder: Path) -> Path:
    return folder.parent / "adapters"


def oracle(folder: Path, name: str | None) -> Oracle:
    return Oracle(folder) if name is None else AdapterOracle(folder, adapters_of(folder) / name)


def load(folder: Path, exports: Path, **options: Any) -> Engine:
    given = {
        "model": str(folder),
        "lora_directory": str(adapters_of(folder)),
        "device": "cpu",
        "speculation": "off",
        "max_num_sequences": 24,
        "max_lora_rank": 16,
        "num_pages": 256,
    }
    engine, *_ = load_engine(EngineConfig.parse(given | options), exports)
    return engine


def answers(
    engine: Engine, asked: Sequence[tuple[np.ndarray, str | None]], **sampling: Any
) -> tuple[list[list[int]], list[Finish]]:
    """Tokens and ends of requests (prompt, adapter), all sent at once."""
    tokens: list[list[int]] = [[] for _ in asked]
    finishes: dict[int, Finish] = {}
    for request_id, (prompt, name) in enumerate(asked):
        params: SamplingParams = parse_sampling(
            {"max_tokens": MAX_TOKENS, "temperature": 0, "lora_name": name, **sampling}
        )
        engine.submit(Submit(request_id, prompt.tobytes(), params, (), "", 1e18))
    while not engine.idle:
        for output in engine.step():
            for request_id, token in zip(output.request_ids.tolist(), output.token_ids.tolist(), strict=True):
                tokens[request_id].append(token)
            finishes |= {finish.request_id: finish for finish in output.finishes}
        engine.check()
    return tokens, [finishes[request_id] for request_id in range(len(asked))]


def everybody(names: Sequence[str | None]) -> list[tuple[np.ndarray, str | None]]:
    """The same prompts for each adapter, so that pages of one would do for another if they were found."""
    return [(prompt, name) for prompt in random_prompts(LENGTHS) for name in names]


def expected(folder: Path, asked: Sequence[tuple[np.ndarray, str | None]]) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for name in {name for _, name in asked}:
        mine = [index for index, (_, other) in enumerate(asked) if other == name]
        found |= dict(
            zip(mine, oracle(folder, name).greedy([asked[index][0] for index in mine], MAX_TOKENS), strict=True)
        )
    return [found[index] for index in range(len(asked))]


@pytest.fixture(scope="module")
def truth(any_checkpoint: Path) -> list[list[int]]:
    """What peft answers everybody."""
    return expected(any_checkpoint, everybody([*ADAPTERS, None]))


SETTINGS: dict[str, dict[str, Any]] = {
    "room for all": {"max_loras": 6},
    "two at a time, chunks": {"max_loras": 2, "max_batched_tokens": 48, "page_size": 4},
    "one at a time": {"max_loras": 1, "prefix_cache": False},
}


@pytest.mark.parametrize(
    ("any_checkpoint", "options"),
    [
        pytest.param(
            kind,
            options,
            id=f"{kind}-{words}",
            marks=() if kind.startswith("llama") and words.startswith("two") else pytest.mark.long,
        )
        for kind in CHECKPOINTS
        for words, options in SETTINGS.items()
    ],
    indirect=["any_checkpoint"],
)
def test_greedy_tokens_of_mixed_steps_are_those_of_peft_alone(
    any_checkpoint: Path, truth: list[list[int]], tmp_path: Path, options: dict[str, Any]
) -> None:
    asked = everybody([*ADAPTERS, None])
    assert len({tuple(answer) for answer in truth[:7]}) > 4, "the adapters change nothing"
    engine = load(any_checkpoint, tmp_path, **options)
    for _ in range(2):  # the second time with what the first left in the cache and in the adapter slots
        tokens, finishes = answers(engine, asked)
        assert [finish.message for finish in finishes] == [""] * len(asked)
        assert tokens == truth
    assert (engine.stats().prefix_hits > 0) == options.get("prefix_cache", True)


def test_logprobs_of_mixed_steps_are_those_of_peft(checkpoint: Path, tmp_path: Path) -> None:
    asked = everybody([*ADAPTERS, None])
    engine = load(checkpoint, tmp_path, max_loras=6, max_batched_tokens=64)
    params = [
        parse_sampling({"max_tokens": 5, "temperature": 0, "lora_name": name, "logprobs": 20}) for _, name in asked
    ]
    for request_id, ((prompt, _), sampling) in enumerate(zip(asked, params, strict=True)):
        engine.submit(Submit(request_id, prompt.tobytes(), sampling, (), "", 1e18))
    tokens: list[list[int]] = [[] for _ in asked]
    tops: list[list[dict[int, float]]] = [[] for _ in asked]
    while not engine.idle:
        for output in engine.step():
            for entry, (request_id, token) in enumerate(
                zip(output.request_ids.tolist(), output.token_ids.tolist(), strict=True)
            ):
                tokens[request_id].append(token)
                tops[request_id].append(output.top_logprobs[entry])
    oracles = {name: oracle(checkpoint, name) for name in [*ADAPTERS, None]}
    for index, (prompt, name) in enumerate(asked):
        truth = oracles[name].logits([*prompt.tolist(), *tokens[index]])[len(prompt) - 1 : -1].log_softmax(-1)
        for position, top in enumerate(tops[index]):
            assert len(top) == 20
            for token, logprob in top.items():
                assert abs(logprob - float(truth[position, token])) < 1e-4


def test_preemption_changes_no_token(checkpoint: Path, tmp_path: Path) -> None:
    asked = everybody(["all of rank 4", "attention, rank 9", None])
    engine = load(
        checkpoint, tmp_path, max_loras=2, num_pages=34, page_size=4, max_model_len=100, max_batched_tokens=32
    )
    assert answers(engine, asked)[0] == expected(checkpoint, asked)
    assert engine.stats().num_preemptions > 0


def test_an_answer_goes_on_in_a_new_engine_as_it_began(checkpoint: Path, tmp_path: Path) -> None:
    """As front ends ask after an engine's death: the prompt, and the answer so far."""
    (prompt, name), *_ = asked = [(prompt, "patterns") for prompt in random_prompts([20])]
    (truth,) = expected(checkpoint, asked)
    engine = load(checkpoint, tmp_path)
    params = parse_sampling({"max_tokens": MAX_TOKENS, "temperature": 0, "lora_name": name})
    resumed = np.concatenate([prompt, np.array(truth[:5], np.int32)])
    engine.submit(Submit(0, resumed.tobytes(), params, (), "", 1e18, num_answered=5))
    tokens: list[int] = []
    while not engine.idle:
        for output in engine.step():
            tokens += output.token_ids.tolist()
    assert tokens == truth[5:]


def test_sequences_of_a_request_and_seeded_ones_are_the_same_in_any_company(checkpoint: Path, tmp_path: Path) -> None:
    """n sequences come as requests of one family, each with a seed of its own."""
    prompt = random_prompts([37])[0]
    names = ["stabilised, rank 16", "mlp, rank 1", None]

    def run(engine: Engine, requests: list[tuple[int, str | None]]) -> list[list[int]]:
        tokens: list[list[int]] = [[] for _ in requests]
        for request_id, (seed, name) in enumerate(requests):
            params = parse_sampling(
                {"max_tokens": 12, "lora_name": name, "seed": seed, "top_p": 0.9, "repetition_penalty": 1.1}
            )
            engine.submit(Submit(request_id, prompt.tobytes(), params, (), "", 1e18, family=names.index(name)))
        while not engine.idle:
            for output in engine.step():
                for request_id, token in zip(output.request_ids.tolist(), output.token_ids.tolist(), strict=True):
                    tokens[request_id].append(token)
            engine.check()
        return tokens

    requests = [(seed, name) for seed in range(3) for name in names]
    together = run(load(checkpoint, tmp_path, max_loras=2, prefix_cache=False), requests)
    alone = load(checkpoint, tmp_path, max_loras=1)
    assert [run(alone, [request])[0] for request in requests] == together
    assert len({tuple(answer) for answer in together}) == len(requests)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody", "lora_name: 'nobody': this server has no such adapter"),
        ("wide", "lora_name: 'wide': model.layers.0.self_attn.q_proj has rank 32, this server takes"),
    ],
    ids=["unknown", "rank"],
)
def test_what_cannot_be_used_ends_alone_and_takes_nobodys_adapter_slot(
    checkpoint: Path, tmp_path: Path, name: str, message: str
) -> None:
    wide = adapters_of(checkpoint) / "wide"
    if not wide.exists():
        save_adapter(wide, checkpoint, 9, rank=32, targets=("q_proj",))
    engine = load(checkpoint, tmp_path, max_loras=1)
    asked = everybody(["all of rank 4", None])
    tokens, finishes = answers(engine, [*asked, (asked[0][0], name)])
    assert tokens == [*expected(checkpoint, asked), []]
    assert finishes[-1].message.startswith(message) and not any(other in finishes[-1].message for other in ADAPTERS)
    answers(engine, [(asked[0][0], name)])
    adapter_slots = next(
        feature for feature in engine._scheduler._features.every if isinstance(feature, AdapterSlots)
    )._adapter_slots
    assert [adapter_slot.name for adapter_slot in adapter_slots] == ["all of rank 4"]
    assert sum(adapter_slot.last_use for adapter_slot in adapter_slots) == len(LENGTHS), "read once"


def test_an_adapter_whose_files_changed_finds_no_pages_of_the_old_one(checkpoint: Path, tmp_path: Path) -> None:
    root = adapters_of(checkpoint)
    engine = load(checkpoint, tmp_path, max_loras=1, page_size=4)
    asked = [(random_prompts([40])[0], "changing")]
    truths = []
    for seed in (20, 21):
        save_adapter(root / "changing", checkpoint, seed, rank=8)
        truths.append(expected(checkpoint, asked))
        assert answers(engine, asked)[0] == truths[-1]
        answers(engine, [(asked[0][0], "all of rank 4")])  # takes its adapter slot
    assert truths[0] != truths[1]


def test_answers_of_a_form_follow_it_with_an_adapter_too(tmp_path: Path) -> None:
    folder = save_speaker(tmp_path / "model")
    for seed, name in enumerate("ab"):
        save_adapter(tmp_path / "adapters" / name, folder, seed, rank=4)
    engine = load_speaker(folder, tmp_path / "exports", lora_directory=str(tmp_path / "adapters"), max_loras=1)
    form = "(yes|no|[0-9]{3}), (sir|madam)"
    samplings = [
        {"guided_regex": form, "lora_name": name, "seed": seed} for seed in range(4) for name in ("a", "b", None)
    ]
    for ended in run(engine, samplings):
        assert ended.reason == "stop" and re.fullmatch(form, ended.text)


def test_a_folder_that_is_not_there_is_named(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="lora_directory: no folder .*nowhere"):
        load(checkpoint, tmp_path, lora_directory=str(tmp_path / "nowhere"))


def test_without_a_folder_of_adapters_nothing_of_them_is_there(checkpoint: Path, tmp_path: Path) -> None:
    engine = load(checkpoint, tmp_path, lora_directory="")
    asked = everybody([None])
    tokens, finishes = answers(engine, [*asked, (asked[0][0], "all of rank 4")])
    assert tokens[:-1] == expected(checkpoint, asked)
    assert finishes[-1].message == "lora_name: 'all of rank 4': this server has no adapters (lora_directory)"
    assert engine._runner.adapter_slots is None and not engine._scheduler._features.active  # type: ignore[attr-defined]
