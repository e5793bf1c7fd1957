"""Coding agents of the command line, unchanged, against the gateway: each is told of a tool of its own by its maker,
calls it because the model says so, and reads the model's answer to what came back.

The model is a script. The agents' prompts alone are longer than the embedded model can read; what is tested is that
the gateway takes everything they send, and that they take what it says.

    pytest -m long tests/clients/test_coding_agents.py   (downloads 1.3 GB of npm packages)
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")

from paged_client.question import Question
from tests.unit.client.gateway_calls import Call, piece
from tests.unit.client.test_openai_tools import HERMES, Model
from tests.unit.client.test_real_clients import KEY, MODEL, serving

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

COMMAND = "echo marmalade-$((40+2))"


@dataclass(frozen=True)
class Agent:
    """package: with the npm version that was tried last. settle: writes its settings into a home folder. run: the
    command and its environment.
    """

    package: str
    shell_tool: str
    shell_arguments: dict[str, Any]
    settle: Callable[[Path, str], None]
    run: Callable[[str], tuple[list[str], dict[str, str]]]


def nothing(home: Path, url: str) -> None:
    pass


def settle_codex(home: Path, url: str) -> None:
    lines = [
        f'model = "{MODEL}"',
        'model_provider = "paged"',
        "[model_providers.paged]",
        'name = "paged"',
        f'base_url = "{url}/v1"',
        'env_key = "PAGED_API_KEY"',
        'wire_api = "responses"',
    ]
    (home / ".codex").mkdir()
    (home / ".codex" / "config.toml").write_text("\n".join(lines))


def settle_opencode(home: Path, url: str) -> None:
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{url}/v1", "apiKey": KEY},
        "models": {MODEL: {"tool_call": True, "limit": {"context": 32768, "output": 4096}}},
    }
    (home / "work" / "opencode.json").write_text(json.dumps({"provider": {"paged": provider}}))


AGENTS = {
    "claude": Agent(
        "@anthropic-ai/claude-code@2.1.197",
        "Bash",
        {"command": COMMAND, "description": "says something"},
        nothing,
        lambda url: (
            ["-p", "Run it.", "--dangerously-skip-permissions"],
            {
                "ANTHROPIC_BASE_URL": url,
                "ANTHROPIC_AUTH_TOKEN": KEY,
                "ANTHROPIC_MODEL": MODEL,
                "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
                "IS_SANDBOX": "1",
            },
        ),
    ),
    "codex": Agent(
        "@openai/codex@0.171.0",
        "exec_command",
        {"cmd": COMMAND},
        settle_codex,
        lambda url: (["exec", "--skip-git-repo-check", "Run it."], {"PAGED_API_KEY": KEY}),
    ),
    "opencode": Agent(
        "opencode-ai@1.18.33",
        "bash",
        {"command": COMMAND, "description": "says something"},
        settle_opencode,
        lambda url: (["run", "Run it.", "--model", f"paged/{MODEL}"], {}),
    ),
    "qwen": Agent(
        "@qwen-code/qwen-code@0.15.10",
        "run_shell_command",
        {"command": COMMAND, "description": "says something", "is_background": False},
        nothing,
        lambda url: (
            ["-y", "-p", "Run it.", "--auth-type", "openai"],
            {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": KEY, "OPENAI_MODEL": MODEL},
        ),
    ),
}


class Scripted(Model):
    """Calls a tool, if it is offered, then says what it heard of it."""

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        super().__init__(HERMES, "")
        self._name = name
        self._call = f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"

    def ask(self, question: Question) -> Call:
        if "messages" not in question.tensors or "task" in question.tensors:
            return super().ask(question)
        messages = json.loads(str(question.tensors["messages"]))
        offered = [tool["function"]["name"] for tool in json.loads(str(question.tensors.get("tools", "[]")))]
        heard = [message["content"] for message in messages if message["role"] == "tool"]
        text = f"I heard {heard[-1]}" if heard else self._call if self._name in offered else "Nothing."
        parts = [text[at : at + 7] for at in range(0, len(text), 7)]
        super().ask(question)
        return Call(self, [*map(piece, parts[:-1]), piece(parts[-1], "stop")])


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not there")
@pytest.mark.parametrize("name", AGENTS)
def test_an_agent_calls_its_tool_and_reads_the_answer(name: str, tmp_path: Path) -> None:
    agent, home = AGENTS[name], tmp_path / "home"
    (home / "work").mkdir(parents=True)
    install = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(tmp_path)]
    installed = subprocess.run([*install, agent.package], capture_output=True, text=True, timeout=300)
    if installed.returncode:
        pytest.skip(f"npm cannot install it: {installed.stderr[-300:]}")
    package = tmp_path / "node_modules" / agent.package.rpartition("@")[0]
    for script in ("install.cjs", "postinstall.mjs"):  # npm asks before it runs these
        if (package / script).exists():
            subprocess.run(["node", str(package / script)], check=True, capture_output=True, timeout=60)
    model = Scripted(agent.shell_tool, agent.shell_arguments)
    with serving(model) as url:
        agent.settle(home, url)
        words, environment = agent.run(url)
        done = subprocess.run(
            [str(tmp_path / "node_modules" / ".bin" / name), *words],
            cwd=home / "work",
            env={"PATH": os.environ["PATH"], "HOME": str(home), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=180,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "marmalade-42" in done.stdout.split("I heard")[-1], done.stdout[-2000:]
    turns = [json.loads(str(question.tensors["messages"])) for question in model.asked if "tools" in question.tensors]
    assert [message["role"] for message in turns[-1]].count("tool") == 1
    assert turns[-1][: len(turns[0])] == turns[0], "what was said before stays: the prefix cache knows it"
