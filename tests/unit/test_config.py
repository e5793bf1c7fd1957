from __future__ import annotations

import re
from pathlib import Path

import pytest

from paged_backend.config import TUNABLES, EngineConfig, demo_model_folder
from paged_backend.errors import EngineError

REFERENCE = Path(__file__).parents[2] / "docs/reference.md"


def test_strings_are_read_as_config_pbtxt_writes_them() -> None:
    config = EngineConfig.parse(
        {"page_size": "32", "prefix_cache": "false", "pool_memory_fraction": "0.5", "dtype": "", "device": "cuda:1"}
    )
    assert (config.page_size, config.prefix_cache, config.pool_memory_fraction, config.dtype, config.device) == (
        32,
        False,
        0.5,
        "auto",
        "cuda:1",
    )


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4GiB", 2**32),
        ("1.5 gib", 3 * 2**29),
        ("500MB", 500_000_000),
        ("2 TiB", 2**41),
        ("64KiB", 65_536),
        ("4294967296", 2**32),
        ("12 b", 12),
        (7, 7),
    ],
)
def test_a_size_takes_units(text: str | int, count: int) -> None:
    assert EngineConfig.parse({"pool_bytes": text}).pool_bytes == count
    assert EngineConfig.parse({"max_prompt_bytes": text}).max_prompt_bytes == count


@pytest.mark.parametrize("text", ["4G", "4 gigabytes", "GiB", "-1", "1e9", "0.3b", "nan", "4 GiB x"])
def test_a_size_of_an_unknown_unit_is_refused_with_what_to_write(text: str) -> None:
    with pytest.raises(EngineError) as caught:
        EngineConfig.parse({"pool_bytes": text})
    assert (
        str(caught.value)
        == f"parameter 'pool_bytes': expected a number of bytes, such as 4GiB, 512MiB or 4000000000, got {text!r}"
    )


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(EngineError, match=r"unknown parameter 'pagesize': did you mean 'page_size'\?"):
        EngineConfig.parse({"pagesize": 16})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("page_size", "0"),
        ("page_size", "24"),
        ("page_size", "x"),
        ("dtype", "int4"),
        ("device", "tpu"),
        ("pool_memory_fraction", "1.5"),
        ("max_waiting_seconds", "nan"),
        ("max_num_sequences", "-1"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name_and_itself(name: str, value: str) -> None:
    with pytest.raises(EngineError) as caught:
        EngineConfig.parse({name: value})
    assert name in str(caught.value) and value in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"gpus": "0,1,2", "replicas": "2", "tensor_parallel_size": "2"},
            "gpus: 2 replicas of 2 ranks need 4 GPUs, 3 are named (0,1,2)",
        ),
        ({"gpus": "0", "tensor_parallel_size": "2"}, "gpus: 2 ranks need 2 GPUs, 1 are named (0)"),
        ({"gpus": "0,0"}, "gpus: expected different numbers or UUIDs with commas between them, got '0,0'"),
        ({"gpus": "0,,1"}, "gpus: expected different numbers or UUIDs with commas between them, got '0,,1'"),
        ({"gpus": "0", "device": "cpu"}, "gpus: 0 are named, and the device is the CPU"),
        (
            {"kv_events": "5557", "replicas": "2"},
            "kv_events: routers listen to one engine, replicas must be 1, not 2",
        ),
    ],
)
def test_gpus_must_do_for_all_replicas_and_ranks(options: dict[str, str], message: str) -> None:
    with pytest.raises(EngineError) as caught:
        EngineConfig.parse(options)
    assert str(caught.value) == message


def test_which_replica_an_engine_is_is_no_tunable() -> None:
    with pytest.raises(EngineError, match=r"^unknown parameter 'replica': did you mean 'replicas'\?$"):
        EngineConfig.parse({"replica": "1"})


def test_one_page_a_sequence_is_allowed_whatever_its_length() -> None:
    assert EngineConfig.parse({"page_size": 1000, "max_model_len": 1000}).page_size == 1000


def test_the_reference_tells_every_tunable_with_its_default() -> None:
    told = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", REFERENCE.read_text(), re.MULTILINE))
    names = {True: "on", False: "off", None: "unset"}
    for name, field in TUNABLES.items():
        default = (
            names[field.default] if field.default is None or isinstance(field.default, bool) else str(field.default)
        )
        assert told.get(name) == default, name


def test_an_empty_folder_that_an_uninstallation_left_behind_is_no_model_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "paged_model_repository").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert (demo_model_folder() / "config.json").is_file()


def test_a_draft_model_is_for_those_who_ask_it() -> None:
    small = {"draft_model": "/models/small"}
    for speculation in ("draft", "auto"):
        assert EngineConfig.parse({"speculation": speculation} | small).num_drafts == 4
        with pytest.raises(EngineError, match="tensor_parallel_size"):
            EngineConfig.parse({"speculation": speculation, "tensor_parallel_size": 2} | small)
    assert EngineConfig.parse({"speculation": "auto", "tensor_parallel_size": 2}).num_drafts == 4
    assert EngineConfig.parse({"speculation": "eagle3"}).num_drafts == 4  # the model's folder may have a head
    assert EngineConfig.parse({"speculation": "off", "num_speculative_tokens": 3}).num_drafts == 0
    assert EngineConfig.parse({"num_speculative_tokens": 3} | small).num_drafts == 3  # auto
    for options in ({"speculation": "draft"}, {"speculation": "ngram"} | small, {"speculation": "off"} | small):
        with pytest.raises(EngineError, match="draft_model"):
            EngineConfig.parse(options)
