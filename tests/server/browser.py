"""A headless Chromium, driven by its DevTools protocol, for tests of the page of `paged top --web`."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@dataclass
class Tab:
    socket: aiohttp.ClientWebSocketResponse
    complaints: list[str] = field(default_factory=list)  # errors in the console
    _serial: int = 0

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._serial += 1
        await self.socket.send_json({"id": self._serial, "method": method, "params": parameters})
        while True:
            message = await self.socket.receive_json(timeout=20)
            if message.get("id") == self._serial:
                return message["result"]
            if (
                message.get("method") == "Runtime.exceptionThrown"
                or message.get("params", {}).get("entry", {}).get("level") == "error"
            ):
                self.complaints.append(str(message["params"]))

    async def value(self, expression: str) -> Any:
        return (await self.call("Runtime.evaluate", expression=expression, returnByValue=True))["result"].get("value")

    async def wait_for(self, expression: str, seconds: float = 15) -> None:
        for _ in range(int(seconds * 10)):
            if await self.value(expression):
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"never became true: {expression}; console: {self.complaints}")


@contextlib.asynccontextmanager
async def open_tab(url: str, folder: Path) -> AsyncIterator[Tab]:
    """`url` in a browser that keeps its files in `folder`."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-port=0",
        f"--user-data-dir={folder}",
        "about:blank",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file = folder / "DevToolsActivePort"
        for _ in range(200):
            if port_file.exists() and port_file.read_text().count("\n"):
                break
            await asyncio.sleep(0.1)
        port = port_file.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                address = next(tab["webSocketDebuggerUrl"] for tab in await answer.json() if tab["type"] == "page")
            async with session.ws_connect(address, max_msg_size=0) as socket:
                tab = Tab(socket)
                for domain in ("Runtime", "Log", "Page"):
                    await tab.call(f"{domain}.enable")
                await tab.call("Page.navigate", url=url)
                yield tab
    finally:
        process.terminate()
        process.wait()
