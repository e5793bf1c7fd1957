"""Several ranks behind a real server: families with experts and with quantised weights answer as transformers does, and
the demo model's streams get the tokens of one rank, and do not notice that a rank is killed under them.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from paged_backend.server.launch import ServerSettings
from tests.e2e.test_rank_deaths import children_of
from tests.expert_models import shrunk
from tests.oracle import Oracle, random_prompts, save_checkpoint
from tests.quantised_checkpoints import save_compressed
from tests.server.calls import engine_pid, metrics, run_all, wait_for_metrics
from tests.server.served import served
from tests.server.test_engine_death import requests
from tests.unit.models.test_expert_checkpoints import save_mxfp4
from tests.unit.models.test_shard import EIGHT_HEADS, LOCAL_EXPERTS

pytestmark = [pytest.mark.server, pytest.mark.long]

OPTIONS: dict[str, Any] = {
    "num_pages": 300,
    "max_num_sequences": 16,
    "dtype": "float32",
    "device": "cpu",
    "max_model_len": 512,
    "max_engine_restarts": 100,
    "standby_engine": True,
}


def test_streams_have_the_tokens_of_one_rank_whatever_dies() -> None:
    asked = requests()[:12]
    with served(ServerSettings(instances=2, options=OPTIONS)) as alone:
        expected = run_all(alone.addresses.grpc_url, asked)
    killed: list[int] = []
    with served(ServerSettings(instances=2, options=OPTIONS | {"tensor_parallel_size": 2})) as server:

        def kill() -> None:
            while not killed:
                pid = engine_pid(server.shm_prefix)
                if pid is not None and metrics(server.addresses.metrics_url)['paged_requests{state="running"}'] > 4:
                    killed.extend(children_of(pid))
                    os.kill(killed[0], signal.SIGKILL)
                time.sleep(0.2)

        killer = threading.Thread(target=kill)
        killer.start()
        answers = run_all(server.addresses.grpc_url, asked)
        killer.join()
        assert wait_for_metrics(
            server.addresses.metrics_url, lambda values: values["paged_engine_restarts_total"] >= 1, 120
        )
    for before, after in zip(expected, answers, strict=True):
        assert (after.error, after.num_finals, after.token_ids) == (None, 1, before.token_ids)
    assert len(killed) == 1


MAX_TOKENS = 12
LENGTHS = (1, 17, 64, 130, 40, 5)
# groups of 128 columns, of which every one of 4 ranks must have whole ones
GROUPED = {"head_dim": 128, "intermediate_size": 512, "num_key_value_heads": 2, "num_attention_heads": 4}


def save_family(folder: Path, name: str) -> Any:
    """The checkpoint's folder is `folder`; what it answers is the result's `greedy`."""
    if name == "gpt-oss in mxfp4":  # nine groups of 32 columns: some ranks have more than others
        meant = folder.with_name("meant")
        save_mxfp4(folder, meant, **EIGHT_HEADS, intermediate_size=288)
        return Oracle(meant)
    if name == "minimax-m2":
        return Oracle(save_checkpoint(folder, "MiniMaxM2ForCausalLM", **EIGHT_HEADS, **LOCAL_EXPERTS, rotary_dim=8))
    if name == "int4 in groups":
        return save_compressed(folder, {"W4A16": ["Linear"]}, **GROUPED)
    if name == "experts":
        save_checkpoint(folder, "Qwen3MoeForCausalLM", **shrunk("qwen3-30b-a3b"))
    else:
        save_checkpoint(folder, "LlamaForCausalLM")
    return Oracle(folder)


FAMILIES = [(name, size) for name in ("dense", "experts", "int4 in groups", "gpt-oss in mxfp4") for size in (2, 4)]
FAMILIES += [("gpt-oss in mxfp4", 8), ("minimax-m2", 8)]


@pytest.mark.parametrize(("name", "size"), FAMILIES, ids=[f"{name}, {size} ranks" for name, size in FAMILIES])
def test_tokens_of_a_family_are_those_of_transformers(name: str, size: int, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    prompts = random_prompts(LENGTHS)
    expected = save_family(folder, name).greedy(prompts, MAX_TOKENS)
    options = OPTIONS | {"tensor_parallel_size": size}
    with served(ServerSettings(model=str(folder), instances=2, options=options)) as server:
        asked = [{"input_ids": prompt.tolist(), "max_tokens": MAX_TOKENS, "temperature": 0.0} for prompt in prompts]
        answers = run_all(server.addresses.grpc_url, asked)
    assert [answer.error for answer in answers] == [None] * len(prompts)
    assert [answer.token_ids for answer in answers] == expected
