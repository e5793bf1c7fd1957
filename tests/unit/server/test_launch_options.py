"""From the command line to parameters of config.pbtxt."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from paged_backend.errors import EngineError
from paged_backend.server.launch import ServerSettings, engine_options
from paged_client.cli import app

REPOSITORY = Path(__file__).parents[3]


def test_a_relative_model_folder_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.chdir(tmp_path)
    assert engine_options(ServerSettings(model="checkpoint"))["model"] == str(tmp_path / "checkpoint")


def test_a_relative_folder_of_adapters_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert engine_options(ServerSettings(model="a/b", options={"lora_directory": "adapters"}))["lora_directory"] == str(
        tmp_path / "adapters"
    )


def test_values_are_written_as_the_engine_reads_them() -> None:
    options = engine_options(ServerSettings(model="a/b", options={"prefix_cache": False, "page_size": 32, "seed": "5"}))
    assert options == {
        "model": "a/b",
        "prefix_cache": "false",
        "page_size": "32",
        "seed": "5",
        "on_engine_loss": "exit",
    }


def test_a_server_of_one_model_ends_when_it_lost_its_engine_unless_the_operator_says_otherwise() -> None:
    assert engine_options(ServerSettings(options={"on_engine_loss": "stay"}))["on_engine_loss"] == "stay"
    assert engine_options(ServerSettings())["on_engine_loss"] == "exit"


def test_a_model_given_twice_is_refused() -> None:
    with pytest.raises(EngineError, match="given twice"):
        engine_options(ServerSettings(model="a/b", options={"model": "c/d"}))


@pytest.mark.parametrize(
    ("arguments", "exit_code", "sentence"),
    [
        pytest.param(
            ["--set", "pagesize=32"], 1, "unknown parameter 'pagesize': did you mean 'page_size'?", id="unknown name"
        ),
        pytest.param(["--set", "page_size=three"], 1, "parameter 'page_size': .* got 'three'", id="wrong value"),
        pytest.param(["--model", "/no/such/folder"], 1, "there is no folder /no/such/folder", id="no folder"),
        pytest.param(["--set", "page_size"], 2, "'page_size' is not of the form KEY=VALUE", id="no value"),
        pytest.param(["--set", "seed=1", "--set", "seed=2"], 2, "'seed' is given twice", id="twice"),
        pytest.param(
            ["--host", "no-such-host.invalid", "--model", "gpt2"], 1, "--host no-such-host.invalid", id="unknown host"
        ),
    ],
)
def test_a_wrong_option_is_one_sentence_and_a_failure(arguments: list[str], exit_code: int, sentence: str) -> None:
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == exit_code
    assert re.search(sentence, " ".join(result.output.split()))
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["serve", "demo"])
def test_every_option_is_explained_in_the_help(command: str) -> None:
    shown = " ".join(CliRunner().invoke(app, [command, "--help"]).output.split())
    options = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    assert len(options) >= 5
    for option in options:
        assert max(option.opts, key=len) in shown
        assert len(option.help.split()) >= 2


def test_the_command_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, paged_client.cli; print(*{'torch', 'transformers'} & set(sys.modules))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout.split()) == (0, []), finished.stderr


def test_every_package_folder_is_listed_for_the_wheel() -> None:
    listed = set(
        re.findall(r'"(paged_backend[\w.]*)"', (REPOSITORY / "pyproject.toml").read_text().split("package-dir")[0])
    )
    found = {
        ".".join(path.parent.relative_to(REPOSITORY).parts) for path in (REPOSITORY / "paged_backend").rglob("*.py")
    }
    assert found <= listed
