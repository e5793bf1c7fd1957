"""`paged chat --tools FILE.py` in a terminal of its own, before a real server: the model's calls are shown, run only if
a person says so, and answered.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("xgrammar")
pytest.importorskip("fastapi")

from paged_backend.config import demo_model_folder
from paged_backend.server.launch import ServerSettings
from tests.server.served import served
from tests.server.test_client_commands import Terminal

pytestmark = [pytest.mark.server, pytest.mark.timeout(180)]

TEMPLATE = """{{ bos_token }}{% for tool in tools or [] %}{{ tool | tojson }} <tool_call></tool_call>
{% endfor %}{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant:<think>{% if not enable_thinking %}</think>{% endif %}{% endif %}"""
TOOLS = '''
from pathlib import Path
from typing import Literal

def look_up(thing: Literal["lamp", "fox"], times: int = 1) -> str:
    """Looks something up in the house."""
    with Path(__file__).with_suffix(".log").open("a") as log:
        print(thing, file=log)
    return f"The {thing} is in the garden."
'''
DIM, PLAIN = r"\x1b\[2m", r"\x1b\[0m"
RED = "\x1b[31m"  # what went wrong


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    checkpoint = tmp_path_factory.mktemp("checkpoint") / "talker"
    shutil.copytree(demo_model_folder(), checkpoint)
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    options = {"num_pages": 200, "dtype": "float32", "speculation": "off"}
    with served(ServerSettings(model=str(checkpoint), instances=1, options=options)) as running:
        yield running.addresses.grpc_url


def called(terminal: Terminal, answer: str) -> str:
    """Waits for a call, checks it, and answers the question whether to run it. Returns the thing it looks up."""
    shown = terminal.wait_for(r"look_up\((\{.*\})\)")
    found = re.search(r"look_up\((\{.*\})\)$", shown)
    assert found
    arguments = json.loads(found[1])
    assert arguments["thing"] in ("lamp", "fox") and set(arguments) <= {"thing", "times"}
    assert isinstance(arguments.get("times", 1), int)
    terminal.wait_for(r"run it\? \[y/N\] ")
    terminal.type(f"{answer}\n")
    return str(arguments["thing"])


def test_a_call_is_run_only_if_a_person_says_so_and_its_result_goes_to_the_model(url: str, tmp_path: Path) -> None:
    file, log = tmp_path / "mine.py", tmp_path / "mine.log"
    file.write_text(TOOLS)
    options = ["--tools", str(file), "--tool-choice", "required", "--temperature", "0", "--max-tokens", "60"]
    terminal = Terminal("chat", "-u", url, *options)
    terminal.wait_for("> ")
    terminal.type("Where is the lamp?\n")
    thing = called(terminal, "y")
    terminal.wait_for(f"{DIM}The {thing} is in the garden\\.{PLAIN}")
    answered = terminal.wait_for(r"answer \d+ tokens.*\r\n> ")
    assert RED not in answered, answered
    assert log.read_text() == f"{thing}\n"
    terminal.type("And now?\n")
    called(terminal, "n")
    terminal.wait_for(f"{DIM}error: the user does not allow this call{PLAIN}")
    assert RED not in terminal.wait_for(r"answer \d+ tokens.*\r\n> ")
    assert log.read_text() == f"{thing}\n", "it was not run"
    terminal.type("\x04")
    assert terminal.exit_status() == 0


def test_a_file_without_tools_is_refused_in_one_sentence(url: str, tmp_path: Path) -> None:
    (tmp_path / "none.py").write_text("_x = 1\n")
    terminal = Terminal("chat", "-u", url, "--tools", str(tmp_path / "none.py"))
    terminal.wait_for(r"it defines no public function")
    assert terminal.exit_status() == 1
