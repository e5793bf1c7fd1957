"""Takes the pictures of docs/tour.md from the real programs: `python -m tools.pictures`. Needs Chromium on PATH, the
font DejaVu Sans Mono, and `.[serve]`.

A server of the embedded model answers `paged chat`, and then a crowd of listeners whose prompts begin alike while
`paged top` and its page look on.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import codecs
import contextlib
import fcntl
import io
import os
import pty
import re
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import AsyncIterator
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from paged_backend.server.launch import Server, ServerSettings
from paged_client import AsyncPagedClient
from tests.server import browser

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "pictures"
PAGED = (sys.executable, "-m", "paged_client.cli")
COLUMNS, LINES = 110, 36
NUM_PAGES = 640
TALK = (
    "Hello! My name is Nora and I live in Lisbon.",
    "Tell me a story about a bear and a kite.",
    "What colour was the kite?",
    "What is 48 + 27?",
    "Write a JSON record with name Tom, age 34 and city Oslo.",
    "Where do I live?",
    "What is the capital of France?",
)
LISTENERS = 9
TOPICS = (
    "a fox and a lantern",
    "a bear and a kite",
    "an owl and a map",
    "a mouse and a drum",
    "a painter called Mira",
    "a sailor called Tom",
)
SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg"><style>
.{unique_id}-matrix {{ font-family: "DejaVu Sans Mono", monospace; font-size: {char_height}px;
  line-height: {line_height}px; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}</style><defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>
{lines}</defs>{chrome}<g transform="translate({terminal_x}, {terminal_y})"
clip-path="url(#{unique_id}-clip-terminal)">{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g></g></svg>"""


class Screen:
    """A command in a terminal of its own, and everything it wrote."""

    def __init__(self, *arguments: str) -> None:
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.execvpe(
                PAGED[0], [*PAGED, *arguments], {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
            )
        fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.written = ""

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def read(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and select.select([self._terminal], [], [], left)[0]:
            with contextlib.suppress(OSError):
                self.written += self._decoder.decode(os.read(self._terminal, 65536))

    def wait_for(self, pattern: str, times: int = 1) -> None:
        for _ in range(600):
            if len(re.findall(pattern, self.written)) >= times:
                return
            self.read(0.1)
        raise SystemExit(f"{pattern!r} never came: {self.written!r}")

    def close(self) -> None:
        self.type("\x03")
        self.read(1.0)
        os.close(self._terminal)
        os.waitpid(self._pid, 0)


def svg_of(written: str, title: str, width: int) -> str:
    """What a terminal shows, with its colours, as a picture of one."""
    plain = re.sub(r"\x1b\[(?![\d;]*m)[?\d;]*[A-Za-z]|\x1b[=>]", "", written.replace("\r\n", "\n")).replace("\r", "")
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(plain.rstrip()), soft_wrap=False)
    return console.export_svg(title=title, theme=MONOKAI, code_format=SVG)


def talk(server: Server) -> str:
    """A conversation typed into `paged chat`."""
    screen = Screen("chat", "--url", server.addresses.grpc_url, "--temperature", "0")
    screen.wait_for("> ")
    for number, line in enumerate(TALK, 1):
        screen.type(f"{line}\r")
        screen.wait_for(r"answer \d+ tokens.*\r\n", number)
        screen.wait_for("> ", number + 1)
    written = screen.written
    screen.close()
    return written.rsplit("> ", 1)[0]


@contextlib.asynccontextmanager
async def crowd(server: Server) -> AsyncIterator[None]:
    """Listeners that ask for one story after the other. What they were told before is the same for all of them: its
    pages are shared.
    """
    async with AsyncPagedClient(server.addresses.grpc_url) as client:
        before = [{"role": "system", "content": "You are Max, a friendly assistant."}]
        for topic in TOPICS:
            before.append({"role": "user", "content": f"Tell me a story about {topic}."})
            before.append(
                {"role": "assistant", "content": (await client.generate(messages=before, temperature=0)).text}
            )

        async def listen(number: int) -> None:
            messages = list(before)
            await asyncio.sleep(0.7 * number)
            while True:
                messages.append(
                    {"role": "user", "content": f"Tell me a long story about {TOPICS[number % len(TOPICS)]}."}
                )
                answer = await client.generate(messages=messages, seed=number, max_tokens=320)
                messages.append({"role": "assistant", "content": answer.text})
                if answer.usage.num_input_tokens > 1200:
                    messages = list(before)

        listeners = [asyncio.create_task(listen(number)) for number in range(LISTENERS)]
        try:
            yield
        finally:
            for listener in listeners:
                listener.cancel()
            await asyncio.gather(*listeners, return_exceptions=True)


def watch(server: Server, seconds: float) -> str:
    """The last frame that `paged top` drew."""
    screen = Screen("top", "--pid", str(server.pid))
    screen.read(seconds)
    screen.wait_for("prefix hits")
    frames = screen.written.split("\x1b[H")
    screen.close()
    return next(frame for frame in reversed(frames[:-1]) if "prefix hits" in frame)


async def photograph(
    url: str, file: Path, width: int, height: int, theme: str = "dark", until: str = "true", wait_seconds: float = 0.0
) -> None:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        async with browser.open_tab("about:blank", Path(folder)) as tab:
            await tab.call(
                "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
            )
            await tab.call("Emulation.setScrollbarsHidden", hidden=True)
            await tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
            await tab.call("Page.navigate", url=url)
            await tab.wait_for("document.readyState == 'complete'")
            await asyncio.sleep(wait_seconds)
            await tab.wait_for(until)
            picture = await tab.call("Page.captureScreenshot", format="png")
    file.write_bytes(base64.b64decode(picture["data"]))
    print(f"{file}: {file.stat().st_size:,} bytes")


async def save(written: str, title: str, file: Path) -> None:
    """A terminal's content as a PNG."""
    svg = svg_of(written, title, COLUMNS)
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert found is not None
    width = 1100
    height = round(width * float(found[2]) / float(found[1]))
    page = f'<body style="margin:0;background:#fff">{svg}</body>'
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "page.html").write_text(page)
        await photograph(f"file://{folder}/page.html", file, width, height)


async def take_pictures(folder: Path) -> None:
    with Server(ServerSettings(instances=1, options={"num_pages": NUM_PAGES}), print) as server:
        await save(await asyncio.to_thread(talk, server), "paged chat", folder / "chat.png")
        async with crowd(server):
            await save(await asyncio.to_thread(watch, server, 25), "paged top", folder / "top.png")
            with subprocess.Popen(
                [*PAGED, "top", "--web", "--port", "0", "--pid", str(server.pid)], stdout=subprocess.PIPE, text=True
            ) as process:
                assert process.stdout is not None
                found = re.search(r"http://127.0.0.1:\d+/", await asyncio.to_thread(process.stdout.readline))
                assert found is not None
                busy = "Number(document.getElementById('tokens').textContent.replace(',', '')) > 0"
                for theme in ("light", "dark"):
                    await photograph(found[0], folder / f"top-web-{theme}.png", 1200, 940, theme, busy, wait_seconds=30)
                process.terminate()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, default=FOLDER)
    asyncio.run(take_pictures(options.parse_args().output))


if __name__ == "__main__":
    main()
