"""`paged generate`, `paged chat` and `paged top` as typed, against a real server of the embedded model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("tritonclient.grpc")

from paged_backend.server.launch import Server, ServerSettings
from paged_client import AsyncPagedClient, InvalidRequestError, PagedClient
from tests.server import browser
from tests.server.calls import settled_metrics, wait_for_metrics
from tests.server.served import served

pytestmark = [pytest.mark.server, pytest.mark.timeout(240)]

QUESTION = [{"role": "user", "content": "Where is the lamp?"}]
ASKED = "Once upon a time there was a lamp in a house by the river. Where was the lamp?"
AS_TEXT = "<|user|>Where is the lamp?<|end|><|assistant|>"
GREEDY = {"temperature": 0, "max_tokens": 12}
PAGED = [sys.executable, "-m", "paged_client.cli"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(
        ServerSettings(instances=1, options={"num_pages": 200, "dtype": "float32", "speculation": "off"})
    ) as running:
        yield running


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, server: Server) -> str:
    return server.addresses.grpc_url if request.param == "grpc" else server.addresses.http_url


def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PAGED, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "COLUMNS": "100"},
    )


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self._screen = pty.fork()
        if self.pid == 0:
            # a test run in the background ignores it, and its children would
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execvpe(
                PAGED[0],
                [*PAGED, *arguments],
                {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"},
            )
        self.seen = ""

    def type(self, keys: str) -> None:
        os.write(self._screen, keys.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Reads on until the pattern is in what came since the last match; returns that."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            assert time.monotonic() < end, self.seen
            if select.select([self._screen], [], [], 0.1)[0]:
                self.seen += os.read(self._screen, 65536).decode(errors="replace")
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def exit_status(self) -> int:
        with contextlib.suppress(OSError):  # what a terminal that nobody holds any more says
            self.wait_for("(?!)", 30)
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self._screen)
        return status


def engine_idle(server: Server) -> bool:
    """Soon: what was left would run for longer than that."""
    return wait_for_metrics(
        server.addresses.metrics_url, lambda values: values['paged_requests{state="running"}'] == 0, seconds=6.0
    )


# ---- messages


def test_messages_are_answered_as_the_templates_text(server: Server, url: str) -> None:
    with PagedClient(url) as client:
        chat = client.generate(messages=QUESTION, **GREEDY)
        text = client.generate(AS_TEXT, **GREEDY)  # the tokenizer begins every text with <|bos|>
        opened = client.generate(
            messages=[*QUESTION, {"role": "assistant", "content": "It is"}], continue_final_message=True, **GREEDY
        )
        written = client.generate(f"{AS_TEXT}It is", **GREEDY)
        assert (chat.token_ids, opened.token_ids) == (text.token_ids, written.token_ids)
        assert chat.usage.num_input_tokens == text.usage.num_input_tokens
        with pytest.raises(
            InvalidRequestError,
            match="^messages: the model's chat template refuses them: role critic is none of system, user",
        ) as refused:
            client.generate(messages=[*QUESTION, {"role": "critic", "content": "x"}])
    assert refused.value.field == "messages"


# ---- generate


def test_generate_prints_the_answer_and_nothing_else(server: Server, url: str) -> None:
    with PagedClient(url) as client:
        expected = client.generate("Once upon a time", **GREEDY).text
    assert run("generate", "Once upon a time", "-u", url, "-t", "0", "-n", "12").stdout == expected + "\n"
    piped = run("generate", "-u", url, "-t", "0", "-s", "max_tokens=12", "--json", stdin="Once upon a time\n")
    answer = json.loads(piped.stdout)
    assert (answer["text"], answer["finish_reason"], answer["usage"]["num_output_tokens"]) == (expected, "length", 12)


@pytest.mark.one_in(2)
def test_generate_prints_several_answers_one_after_the_other(server: Server, url: str) -> None:
    with PagedClient(url) as client:
        expected = [
            answer.text
            for answer in client.generate("Once upon a time", n=2, seed=3, max_tokens=9, logprobs=0).sequences
        ]
    asked = ("generate", "Once upon a time", "-u", url, "--seed", "3", "-n", "9", "-s", "n=2")
    assert run(*asked).stdout == "\n\n".join(expected) + "\n"
    answer = json.loads(run(*asked, "-s", "logprobs=0", "--json").stdout)
    assert [answer["text"], *(other["text"] for other in answer["others"])] == expected
    assert [entry[0]["token_id"] for entry in answer["others"][0]["logprobs"]] == answer["others"][0]["token_ids"]


def test_generate_says_what_is_wrong_in_one_sentence(server: Server) -> None:
    for arguments, sentence in {
        ("-u", server.addresses.grpc_url, "-s", "top_p=7"): "top_p: expected float <= 1.0, got 7",
        (
            "-u",
            server.addresses.grpc_url,
            "--model-name",
            "nonesuch",
        ): "Request for unknown model: 'nonesuch' is not found",
        ("-u", "ftp://x"): "'ftp://x' is no URL of a server: expected HOST:PORT, grpc://HOST:PORT or http://HOST:PORT",
    }.items():
        finished = run("generate", "x", *arguments)
        assert (finished.returncode, finished.stdout, finished.stderr) == (1, "", f"paged: error: {sentence}\n")


@pytest.mark.parametrize("options", [[], pytest.param(["--json"], marks=pytest.mark.long)], ids=["stream", "json"])
def test_generate_has_a_sentence_for_a_full_disk_too(server: Server, options: list[str]) -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [*PAGED, "generate", "x", "-u", server.addresses.grpc_url, *options],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert (ended.returncode, ended.stderr) == (1, "paged: error: standard output: No space left on device\n")


@pytest.mark.long
def test_generate_with_closed_streams_does_what_it_can(server: Server) -> None:
    words = [*PAGED, "generate", "-u", server.addresses.grpc_url]
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert (closed.returncode, closed.stdout, closed.stderr) == (
        1,
        "",
        "paged: error: text_input: the prompt is empty\n",
    )
    mute = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *words, ASKED], stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )
    assert (mute.returncode, mute.stderr) == (0, "")


def test_json_has_the_prompts_logprobs(server: Server) -> None:
    ended = run("generate", ASKED, "-u", server.addresses.grpc_url, "--json", "-s", "prompt_logprobs=1", "-n", "1")
    entries = json.loads(ended.stdout)["prompt_logprobs"]
    assert (
        entries[0] is None
        and len(entries) > 5
        and set(entries[1][0]) == {"token_id", "text", "logprob", "rank", "part"}
    )


# ---- chat


def test_a_program_that_chats_learns_of_failed_questions(server: Server) -> None:
    good, bad = ("chat", "-u", server.addresses.grpc_url), ("chat", "-u", server.addresses.grpc_url, "-s", "top_p=7")
    assert run(*good, stdin="Where is the lamp?\n/exit\n").returncode == 0
    assert run(*bad, stdin="Where is the lamp?\n").returncode == 1


@pytest.mark.parametrize("wrong", ["url", "model"])
def test_a_chat_with_nobody_says_so_before_the_first_question(server: Server, wrong: str) -> None:
    url, name = ("localhost:1", "paged_llm") if wrong == "url" else (server.addresses.http_url, "nonesuch")
    told = run("chat", "-u", url, "--model-name", name, stdin="Hello!\n")
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr.startswith(f"paged: error: no model '{name}' is ready at {url}: ")


def test_a_chat_goes_on_with_its_history_and_the_prefix_cache_knows_it(server: Server) -> None:
    told = run(
        "chat",
        "-u",
        server.addresses.grpc_url,
        "-t",
        "0",
        "-n",
        "40",
        stdin=f"{ASKED}\nAnd who took it?\n/reset\n{ASKED}\n",
    )
    assert told.returncode == 0, told.stderr
    lines = [
        line
        for line in told.stdout.splitlines()
        if re.search(r"^prompt \d+ tokens.*, answer \d+ tokens: the first after \d+ ms", line)
    ]
    inputs = [int(line.split()[1]) for line in lines]
    assert len(lines) == 3
    assert inputs[1] > inputs[0] == inputs[2]
    assert re.search(r"\([1-9]\d* cached\)", lines[1])


TEN_TURNS = {  # what is said, and what the answer must have in it
    "Hello!": "Hello!",
    "My name is Nora and I live in Lisbon.": "",
    "I have a cat called Pepper.": "",
    "Tell me a story about a bear and a kite.": "bear.*kite",
    "What colour was the kite?": r"^The kite was \w+\.$",
    "What is 48 + 27?": "75",
    "Sort these numbers: 9, 4, 12, 1": "^1, 4, 9, 12$",
    "What is my name?": "Nora",
    "Where do I live?": "Lisbon",
    "What is my cat called?": "Pepper",
}


@pytest.mark.long
def test_a_chat_of_ten_turns_remembers_and_top_shows_the_prefix_hits(server: Server) -> None:
    before = hits_and_queries(settled_metrics(server.addresses.metrics_url))
    told = run("chat", "-u", server.addresses.grpc_url, "-t", "0", stdin="\n".join(TEN_TURNS))
    assert told.returncode == 0, told.stderr
    *parts, rest = re.split(r"^prompt (\d+) tokens(?: \((\d+) cached\))?, answer .*\n", told.stdout, flags=re.MULTILINE)
    answers, lengths, cached = (
        parts[::3],
        [int(length) for length in parts[1::3]],
        [int(number or 0) for number in parts[2::3]],
    )
    assert (len(answers), rest) == (10, "")
    for answer, pattern in zip(answers, TEN_TURNS.values(), strict=True):
        assert re.search(pattern, answer.strip()), told.stdout
    assert f" {answers[4].split()[-1].rstrip('.')} kite" in answers[3], told.stdout
    # every earlier prompt's full pages
    assert all(number >= (previous - 1) // 16 * 16 for previous, number in zip(lengths, cached[1:], strict=False))
    hits, queries = before[0] + sum(cached), before[1] + sum(lengths)
    assert wait_for_metrics(server.addresses.metrics_url, lambda values: hits_and_queries(values) == (hits, queries))
    shown = re.search(r"prefix hits .*\((\d+) % since start\)", run("top", "--once", "--pid", str(server.pid)).stdout)
    assert shown is not None
    assert int(shown[1]) == pytest.approx(100 * hits / queries, abs=0.51)
    assert int(shown[1]) > 0


def hits_and_queries(values: dict[str, float]) -> tuple[int, int]:
    """The prefix cache's, in tokens, since the server's start."""
    return int(values["paged_prefix_cache_hits_total"]), int(values["paged_prefix_cache_queries_total"])


def test_ctrl_c_stops_the_answer_and_not_the_chat(server: Server) -> None:
    terminal = Terminal("chat", "-u", server.addresses.grpc_url, "-t", "0", "-n", "1500", "-s", "ignore_eos=true")
    terminal.wait_for("> ")
    terminal.type("Where is the lamp?\r")
    terminal.wait_for(r"lamp\?")
    terminal.wait_for(r"(\w+\W+){5}")
    terminal.type("\x03")
    assert int(re.findall(r"answer (\d+)", terminal.wait_for(r"stopped: prompt .* ms"))[0]) < 1500
    terminal.wait_for("> ")
    assert engine_idle(server)
    terminal.type("/system\r")
    terminal.wait_for("no system message")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.exit_status() == 0


# ---- top


async def keep_busy(url: str) -> None:
    async with AsyncPagedClient(url) as client:
        async for _ in client.stream("Once upon a time there was a lamp", max_tokens=1900, ignore_eos=True):
            pass


@pytest.fixture
def busy(server: Server) -> Iterator[None]:
    """A request that runs meanwhile."""
    program = (
        "import asyncio; from tests.server.test_client_commands import keep_busy; "
        f"asyncio.run(keep_busy({server.addresses.grpc_url!r}))"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2]) as process:
        wait_for_metrics(
            server.addresses.metrics_url, lambda values: values['paged_requests{state="running"}'] == 1, seconds=60
        )
        yield
        process.kill()
    assert engine_idle(server)


def test_top_shows_the_pool_of_a_server_that_somebody_started(server: Server, busy: None) -> None:
    finished = run("top", "--once", "--pid", str(server.pid))
    assert finished.returncode == 0, finished.stderr
    assert "paged_llm: demo  200 pages of 16 tokens" in finished.stdout
    assert re.search(r"running 1 +waiting 0", finished.stdout)
    assert re.search(r"tokens/s [1-9]", finished.stdout)
    held = re.search(r"held (\d+)", finished.stdout)
    assert held is not None
    marks = re.findall(r"│ ([·□◆a ]+) +│", finished.stdout)
    assert "".join(marks).count("a") == int(held[1]) > 0


def test_top_in_a_terminal_leaves_it_as_it_was(server: Server) -> None:
    terminal = Terminal("top", "--url", server.addresses.http_url, "--model", "paged_llm")
    terminal.wait_for("prefix hits")
    terminal.type("\x03")
    assert "\x1b[?1049l" in terminal.wait_for(r"\x1b\[\?1049l")
    assert terminal.exit_status() == 0


@pytest.fixture
def page(server: Server) -> Iterator[str]:
    """The address of `paged top --web`."""
    with subprocess.Popen(
        [*PAGED, "top", "--web", "--port", "0", "--pid", str(server.pid)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://127.0.0.1:\d+/", process.stdout.readline())
            assert found is not None
            yield found[0]
        finally:
            process.terminate()


def test_the_page_gets_events_with_a_map(busy: None, page: str) -> None:
    with urllib.request.urlopen(f"{page}events", timeout=10) as events:
        event = json.loads(events.readline().removeprefix(b"data: "))
    assert (event["model"], event["num_pages"], event["num_running"], event["trouble"]) == ("demo", 200, 1, "")
    assert len(event["cells"]) == 536


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium on PATH")
def test_a_browser_draws_the_map_in_light_and_dark(busy: None, page: str, tmp_path: Path) -> None:
    """The picture has a request's colour, and the console has no error."""
    colourful = """[...document.getElementById("map").getContext("2d").getImageData(0, 0, 1200, 400).data]
        .some((value, i, all) => i % 4 == 0 && Math.abs(value - all[i + 1]) > 90)"""

    async def look() -> tuple[list[str], list[str]]:
        papers = []
        async with browser.open_tab(page, tmp_path) as tab:
            await tab.wait_for(colourful)
            await tab.wait_for("Number(document.getElementById('tokens').textContent.replace(',', '')) > 0")
            for theme in ("light", "dark"):
                await tab.call(
                    "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}]
                )
                await tab.wait_for(colourful)
                papers.append(await tab.value("getComputedStyle(document.body).backgroundColor"))
        return papers, tab.complaints

    papers, complaints = asyncio.run(look())
    assert papers == ["rgb(246, 247, 249)", "rgb(18, 21, 27)"]
    assert complaints == []
