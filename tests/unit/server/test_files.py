"""What `paged serve` looks for and puts on disk, without starting a server."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError
from paged_backend.server import files as server_files
from paged_backend.server.files import (
    Installation,
    check_checkpoint,
    find_installation,
    prepare_backends,
    prepare_environment,
    prepare_repository,
)

OTHER_MINOR = sys.version_info.minor + 1
needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("pytriton") is None, reason="nvidia-pytriton is not installed"
)


@pytest.fixture
def server_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out like an installed Triton Server, its bin on PATH."""
    root = tmp_path / "tritonserver"
    executable = root / "bin" / "tritonserver"
    executable.parent.mkdir(parents=True)
    executable.write_text("#!/bin/sh\n")
    executable.chmod(0o755)
    add_backend(root / "backends", sys.version_info.minor)
    monkeypatch.setenv("PATH", str(executable.parent))
    monkeypatch.delenv("TRITON_BACKENDS", raising=False)
    return root


def add_backend(backends: Path, minor: int) -> None:
    python = backends / "python"
    python.mkdir(parents=True, exist_ok=True)
    (python / "libtriton_python.so").touch()
    (python / "triton_python_backend_stub").write_bytes(b"\x7fELF\0libpython3.%d.so.1.0\0" % minor)


def test_a_tritonserver_on_path_is_used_with_the_backends_next_to_it(server_on_path: Path) -> None:
    assert find_installation() == Installation(server_on_path / "bin" / "tritonserver", server_on_path / "backends")


def test_triton_backends_overrides_the_folder_next_to_the_server(
    server_on_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_backend(tmp_path / "elsewhere", sys.version_info.minor)
    monkeypatch.setenv("TRITON_BACKENDS", str(tmp_path / "elsewhere"))
    assert find_installation().backends == tmp_path / "elsewhere"


def test_a_server_without_python_backend_is_refused_with_the_remedy(
    server_on_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_BACKENDS", str(server_on_path / "nowhere"))
    with pytest.raises(EngineError, match="no Python backend in .*nowhere: set TRITON_BACKENDS"):
        find_installation()


def test_a_server_whose_stub_has_another_python_is_refused(server_on_path: Path) -> None:
    add_backend(server_on_path / "backends", OTHER_MINOR)
    with pytest.raises(
        EngineError, match=rf"runs models with Python 3\.{OTHER_MINOR}, but this is Python 3\.{sys.version_info.minor}"
    ):
        find_installation()


def test_no_server_anywhere_is_refused_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"no tritonserver on PATH"):
        find_installation()


@needs_wheel
def test_the_wheels_server_is_refused_with_numpy_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.3.1")
    with pytest.raises(EngineError, match=r"needs NumPy 1, but NumPy 2\.3\.1 is installed"):
        find_installation()


@needs_wheel
def test_the_wheels_backend_folder_is_complete_and_runs_with_this_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    installation = find_installation()
    backends = prepare_backends(installation, tmp_path)
    assert all(
        (backends / "python" / name).is_file()
        for name in ("libtriton_python.so", "triton_python_backend_utils.py", "triton_python_backend_stub")
    )
    environment = prepare_environment(installation, tmp_path)
    assert Path(shutil.which("python3", path=environment["PATH"]) or "").resolve() == Path(sys.executable).resolve()
    assert "PYTHONPATH" not in environment


@needs_wheel
def test_a_missing_library_is_named_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    installation = find_installation()
    lacking = tmp_path / "program"
    lacking.write_bytes(installation.executable.read_bytes().replace(b"libb64-", b"libb65-"))
    lacking.chmod(0o755)
    with pytest.raises(EngineError, match=r"needs libb65-\S+, which this machine lacks"):
        prepare_environment(Installation(lacking, None, installation.backend_files, installation.libraries), tmp_path)


@pytest.fixture
def template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shipped = tmp_path / "shipped"
    (shipped / "paged_llm" / "1").mkdir(parents=True)
    (shipped / "paged_llm" / "config.pbtxt").write_text(
        """
        name: "paged_llm"  # a comment
        backend: "python"
        instance_group [ { count: 4 kind: KIND_MODEL } ]
        parameters { key: "page_size" value { string_value: "16" } }
        parameters { key: "seed" value { string_value: "7" } }
        """
    )
    (shipped / "paged_llm" / "1" / "model.py").write_text("# the model")
    monkeypatch.setattr(server_files, "repository_folder", lambda: shipped)
    return shipped


def test_the_private_repository_is_the_template_with_the_chosen_options(template: Path, tmp_path: Path) -> None:
    text_format = pytest.importorskip("google.protobuf.text_format")
    model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    shipped_before = (template / "paged_llm" / "config.pbtxt").read_text()
    options = {"page_size": "32", "model": 'odd "name"\\'}
    repository = prepare_repository(tmp_path, model_name="chat", options=options, instances=2)
    written = text_format.Parse((repository / "chat" / "config.pbtxt").read_text(), model_config.ModelConfig())
    assert {name: value.string_value for name, value in written.parameters.items()} == {
        "page_size": "32",
        "seed": "7",
        "model": 'odd "name"\\',
    }
    assert (written.name, written.instance_group[0].count) == ("chat", 2)
    assert (repository / "chat" / "1" / "model.py").read_text() == "# the model"
    assert (template / "paged_llm" / "config.pbtxt").read_text() == shipped_before


@pytest.mark.parametrize("name", ["", "../up", "a b", "-x"])
def test_a_model_name_that_is_no_folder_name_is_refused(template: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("tritonclient.grpc.model_config_pb2")
    with pytest.raises(EngineError, match="model name"):
        prepare_repository(tmp_path, model_name=name, options={}, instances=None)


def write_checkpoint(folder: Path, files: dict[str, str]) -> EngineConfig:
    for name, text in files.items():
        (folder / name).write_text(text)
    return EngineConfig.parse({"model": str(folder)})


INDEX = json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        pytest.param({}, "no config.json in", id="no config"),
        pytest.param({"config.json": "{"}, "config.json is broken", id="config cut short"),
        pytest.param({"config.json": "[]"}, "config.json is broken: not an object", id="config is a list"),
        pytest.param({"config.json": "{}"}, "no safetensors file in", id="no weights"),
        pytest.param(
            {"config.json": "{}", "model.safetensors.index.json": "{}"}, "index.json is broken", id="index without map"
        ),
        pytest.param(
            {"config.json": "{}", "model.safetensors.index.json": INDEX, "one.safetensors": ""},
            "1 of 2 weight files are missing, the first is two.safetensors",
            id="shard missing",
        ),
    ],
)
def test_a_broken_checkpoint_is_refused_by_name_before_the_start(
    tmp_path: Path, files: dict[str, str], complaint: str
) -> None:
    with pytest.raises(EngineError, match=complaint) as refused:
        check_checkpoint(write_checkpoint(tmp_path, files))
    assert str(tmp_path) in str(refused.value)


def test_a_complete_checkpoint_and_dummy_weights_pass(tmp_path: Path) -> None:
    check_checkpoint(write_checkpoint(tmp_path, {"config.json": "{}"}).model_copy(update={"load_format": "dummy"}))
    check_checkpoint(write_checkpoint(tmp_path, {"config.json": "{}", "model.safetensors": ""}))


@pytest.mark.parametrize(
    ("described", "fits"),
    [
        pytest.param('{"max_position_embeddings": 2048}', False, id="longer than it was trained for"),
        pytest.param(
            '{"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}',
            False,
            id="plain rope",
        ),
        pytest.param('{"max_position_embeddings": 4096}', True, id="just as long"),
        pytest.param(
            '{"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 2.0}}',
            True,
            id="scaled: the engine knows",
        ),
        pytest.param(
            '{"max_position_embeddings": 2048, "rope_parameters": {"full_attention": {"rope_type": "linear"}}}',
            True,
            id="a rope a kind of layer",
        ),
        pytest.param("{}", True, id="unknown"),
    ],
)
def test_a_length_beyond_the_checkpoint_is_refused_before_anything_starts(
    tmp_path: Path, described: str, fits: bool
) -> None:
    config = write_checkpoint(tmp_path, {"config.json": described, "model.safetensors": ""}).model_copy(
        update={"max_model_len": 4096}
    )
    if fits:
        check_checkpoint(config)
    else:
        with pytest.raises(EngineError, match=r"^max_model_len: 4096 is more than the checkpoint allows \(2048\)$"):
            check_checkpoint(config)


@pytest.mark.parametrize("model", ["Qwen/Qwen3-0.6B", "gpt2"])
def test_a_hub_id_is_left_to_the_engine(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_checkpoint(EngineConfig.parse({"model": model}))


@pytest.mark.parametrize("model", ["/no/such/folder", "./folder", "~/folder", "a/b/c"])
def test_a_folder_that_is_not_there_is_refused(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineError, match="there is no folder"):
        check_checkpoint(EngineConfig.parse({"model": model}))


def test_environment_of_a_foreign_server_keeps_its_library_path(
    server_on_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/its/own")
    environment = prepare_environment(find_installation(), tmp_path)
    assert environment["LD_LIBRARY_PATH"] == "/its/own"
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
