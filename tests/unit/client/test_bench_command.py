"""`paged bench` on the command line, as far as it goes without a server."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from paged_backend.errors import EngineError
from paged_client.bench import perf_analyzer
from paged_client.bench.target import split_url
from paged_client.cli import app


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def stand_in(folder: Path, script: str = "exit 0") -> Path:
    """A perf_analyzer that runs."""
    folder.mkdir(parents=True, exist_ok=True)
    executable = folder / "perf_analyzer"
    executable.write_text(f"#!/bin/sh\n{script}\n")
    executable.chmod(0o755)
    return executable


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("-c 0", "--concurrency 0: expected numbers above 0"),
        ("-c 1.5", "--concurrency 1.5: expected whole numbers from 1 to 4096"),
        ("-c 9999", "--concurrency 9999: expected whole numbers from 1 to 4096"),
        ("-c x", "--concurrency x: expected numbers with commas"),
        ("-r nan", "--rates nan: expected numbers above 0"),
        ("-r 1 -c 1", "--rates and --concurrency: give one of them"),
        ("-c 8 -n 4", r"--requests 4: expected as many as there are streams \(8\)"),
        ("-r 8 -n 4", r"--requests 4: expected a second's worth of the rate \(8\)"),
        ("--input-tokens 5:2", "--input-tokens 5:2: expected 1 or more tokens, the lower end first"),
        ("--output-tokens 0", "--output-tokens 0: expected 1 or more tokens"),
        ("--prefixes 3", "--prefixes 3: goes with --shared-prefix"),
        ("--against-model x", "--against-model x: goes with --against"),
        ("--url localhost:1 --set page_size=32", "--set: is for a server that paged bench starts"),
        ("--set page_size", "is not of the form KEY=VALUE"),
        ("--set pagesize=3", "unknown parameter 'pagesize': did you mean 'page_size'"),
        ("--model /no/such", "there is no folder /no/such"),
        ("--url nowhere", "--url nowhere: expected the host and port of gRPC"),
        ("--url localhost:1", "--url localhost:1: no Triton Server answers there"),
        ("--timeout 0", "--timeout"),
        ("memory --page-size 24", "--page-size 24: expected a power of two"),
        ("memory --rates x", "--rates x: expected numbers"),
        ("-c 4 memory", "options of paged bench memory go behind the word memory"),
    ],
)
def test_a_wrong_option_is_one_sentence_that_names_it(
    arguments: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(stand_in(tmp_path / "bin").parent), prepend=":")
    result = CliRunner().invoke(app, ["bench", *arguments.split()])
    assert result.exit_code in (1, 2)
    assert re.search(sentence, " ".join(result.output.split())), result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.glob("paged-bench*")), "a failure leaves no folder"


@pytest.mark.parametrize("words", [["bench"], ["bench", "memory"]], ids=" ".join)
def test_every_option_is_explained_in_the_help(words: list[str]) -> None:
    shown = " ".join(CliRunner().invoke(app, [*words, "--help"]).output.split())
    command = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]  # type: ignore[attr-defined]
    assert len(command.params) >= 10
    for option in command.params:
        assert option.help, f"{option.opts} has no help"  # type: ignore[attr-defined]
        assert " ".join(option.help.split())[:20] in shown  # type: ignore[attr-defined]


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "results.json").touch()
    result = CliRunner().invoke(app, ["bench", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "holds results already" in result.output


def test_the_command_imports_no_matplotlib() -> None:
    code = "import sys, paged_client.cli; sys.exit('matplotlib' in sys.modules or 'tritonclient' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("url", ["localhost:8001", "grpc://localhost:8001", "http://localhost:8001/"])
def test_an_address_may_have_a_scheme(url: str) -> None:
    assert split_url("--url", url) == "localhost:8001"


@pytest.mark.parametrize("url", ["", "localhost", ":8001", "localhost:x", "localhost:99999", "localhost:8001/v2"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(EngineError, match="expected the host and port"):
        split_url("--url", url)


def test_perf_analyzer_on_path_is_taken_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable = stand_in(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(executable.parent), prepend=":")
    found = perf_analyzer.find_perf_analyzer(pytest.fail)
    assert found.executable == executable


def test_perf_analyzer_is_brought_from_the_wheel_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "tritonclient.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr(perf_analyzer._BINARY, "#!/bin/sh\nexit 0\n")
    said: list[str] = []
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(perf_analyzer, "_download", lambda folder: wheel)
    first = perf_analyzer.find_perf_analyzer(said.append)
    assert first.executable.is_relative_to(tmp_path / "cache" / "paged")
    monkeypatch.setattr(perf_analyzer, "_download", pytest.fail)
    assert perf_analyzer.find_perf_analyzer(said.append).executable == first.executable
    assert len(said) == 1
    assert not list((tmp_path / "cache" / "paged").glob("bringing-*"))


def test_a_missing_library_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "perf_analyzer: error while loading shared libraries: libb64.so.0d: cannot open shared object file"
    monkeypatch.setenv("PATH", str(stand_in(tmp_path / "bin", f"echo '{message}' >&2; exit 127").parent), prepend=":")
    with pytest.raises(EngineError, match=r"libb64.so.0d.*pip install .*nvidia-pytriton"):
        perf_analyzer.find_perf_analyzer(pytest.fail)


def test_a_download_that_fails_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(perf_analyzer, "WHEEL_VERSION", "0.0.0.no.such")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(EngineError, match=r"pip cannot bring tritonclient 0\.0\.0\.no\.such: ERROR"):
        perf_analyzer.find_perf_analyzer(lambda line: None)
