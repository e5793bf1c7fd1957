"""Asking a real tritonserver, over gRPC and HTTP. When the server itself dies or stops answering, that is written down
and another one is started.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import aiohttp
import tritonclient.grpc.aio as grpc
from tritonclient.utils import InferenceServerException

from paged_backend.server import files as server_files
from paged_backend.server.launch import Server, ServerSettings
from tests.bench.bench_streams import family
from tests.chaos.front_end_door import LONGEST_PAUSE_SECONDS
from tests.chaos.judge import Heard
from tests.server.calls import MODEL, metrics, tensor, tensor_array

_MODEL_PY = """
from paged_backend.engine_client import supervisor as engine_supervisor
from paged_backend.frontend import triton_io

engine_supervisor._LONGEST_PAUSE_SECONDS = {pause}


class TritonPythonModel(triton_io.TritonPythonModel):
    engine_command = {command!r}
"""
_WANTED = {
    "return_output_ids": True,
    "return_finish_reason": True,
    "return_num_output_tokens": True,
    "return_sequence_index": True,
}
# in the command lines of engines and of what stands for them
_ENGINES = (b"chaotic_engine", b"newborn", b"engine.process", b"rank_process")
_BROKEN_CONNECTION = (
    "Socket closed",
    "Connection reset",
    "failed to connect",
    "Connection refused",
    "Cannot connect",
    "Server disconnected",
    "not completed",
)
_LAST_LOG_LINES = 40
_PROBE_SECONDS = 10.0


class ServerDoor:
    """One tritonserver at a time."""

    transports = ("grpc", "grpc", "grpc", "http")

    def __init__(self, options: dict[str, Any], instances: int, command: list[str] | None) -> None:
        """command: how to start the engine; None: as paged does."""
        self._options, self._instances, self._command = options, instances, command
        self.broken: list[dict[str, Any]] = []  # how servers ended that nobody told to
        self._numbers_before: dict[str, float] = {}
        self._numbers: dict[str, float] = {}
        self._reviving = asyncio.Lock()
        self._start()

    def _start(self) -> None:
        prepare = server_files.prepare_repository
        if self._command is not None:
            server_files.prepare_repository = self._prepare_repository  # type: ignore[assignment]
        try:
            self._server = Server(ServerSettings(instances=self._instances, options=self._options, drain_seconds=20))
            self._server.start(120)
        finally:
            server_files.prepare_repository = prepare
        self._client: grpc.InferenceServerClient | None = None
        self._began = time.monotonic()

    def _prepare_repository(
        self, folder: Path, *, model_name: str, options: dict[str, str], instances: int | None
    ) -> Path:
        """The model with another engine."""
        repository = _PREPARE_REPOSITORY(folder, model_name=model_name, options=options, instances=instances)
        version = repository / model_name / "1"
        version.unlink()
        version.mkdir()
        (version / "model.py").write_text(_MODEL_PY.format(command=self._command, pause=LONGEST_PAUSE_SECONDS))
        return repository

    async def ask(
        self,
        tensors: dict[str, Any],
        parameters: dict[str, Any],
        *,
        note: Callable[[], None],
        stream: bool = True,
        leave_after: float = 0.0,
        leave_at: int = 0,
        slow: float = 0.0,
        transport: str = "grpc",
        disconnect: bool = False,
    ) -> Heard:
        """disconnect: the caller leaves by closing its connection, not only the stream."""
        heard = Heard()
        talk = _Talk(heard, note, leave_at, slow)
        if transport == "http":
            conversation = talk.over_http(self._server.addresses.http_url, tensors, parameters, stream)
        else:
            conversation = talk.over_grpc(
                self._grpc(), self._server.addresses.grpc_url if disconnect else "", tensors, parameters, stream
            )
        server = self._server
        try:
            await asyncio.wait_for(conversation, leave_after or None)
        except asyncio.TimeoutError:
            pass
        except (InferenceServerException, OSError, aiohttp.ClientError) as error:
            heard.error = heard.error or str(error)
        if heard.error and (server is not self._server or not self.alive() or _is_broken_connection(heard.error)):
            heard.error, heard.lost_with_server = "", heard.error
        return heard

    def _grpc(self) -> grpc.InferenceServerClient:
        if self._client is None:
            self._client = grpc.InferenceServerClient(self._server.addresses.grpc_url)
        return self._client

    def numbers(self) -> dict[str, float]:
        """Gauges of this server, and counters of all servers so far, as `name/label`."""
        with suppress(OSError):
            found: Counter[str] = Counter()  # of all replicas together
            for name, value in metrics(self._server.addresses.metrics_url).items():
                found[_slashed(name)] += value
            self._numbers = dict(found)
        before = self._numbers_before
        return {
            name: value + (before.get(name, 0.0) if "_total/" in name else 0.0) for name, value in self._numbers.items()
        }

    def memory(self) -> dict[str, int]:
        """Of the server and its front ends, without the engine."""
        pids = [pid for pid in family(self._server.pid) if not any(name in _command(pid) for name in _ENGINES)]
        shared = sum(path.stat().st_blocks * 512 for path in Path("/dev/shm").glob(f"{self._server.shm_prefix}*"))
        return {
            "resident": sum(resident_bytes(pid) for pid in pids),
            "files": sum(count_of(f"/proc/{pid}/fd") for pid in pids),
            "threads": sum(count_of(f"/proc/{pid}/task") for pid in pids),
            "dev_shm": shared,
        }

    def alive(self) -> bool:
        return self._server.wait(0) is None

    async def revive(self) -> None:
        """Another server, if this one is gone or answers nobody."""
        async with self._reviving:
            loop = asyncio.get_running_loop()
            code = self._server.wait(0)
            if code is None and await loop.run_in_executor(None, self._answers):
                return
            self.broken.append(self._post_mortem(code))
            for name, value in self._numbers.items():
                if "_total/" in name:
                    self._numbers_before[name] = self._numbers_before.get(name, 0.0) + value
            self._numbers = {}
            if self._client is not None:
                with suppress(Exception):
                    await self._client.close()
            self._server.kill()
            await loop.run_in_executor(None, self._server.stop)
            await loop.run_in_executor(None, self._start)

    def _answers(self) -> bool:
        try:
            with urlopen(f"{self._server.addresses.http_url}/v2/models/{MODEL}/ready", timeout=_PROBE_SECONDS) as page:
                return bool(page.status == 200)
        except OSError:
            return False

    def _post_mortem(self, code: int | None) -> dict[str, Any]:
        """How the server ended: its own code crashed (a signal to tritonserver itself: no code of ours runs in that
        process), or it hangs.
        """
        ended = "hangs" if code is None else f"ended by signal {-code}" if code < 0 else f"exit code {code}"
        return {
            "server": ended,
            "after_seconds": round(time.monotonic() - self._began),
            "log": self._server.log_lines()[-_LAST_LOG_LINES:],
        }

    def close(self) -> list[str]:
        """Ends the server. Returns what was wrong with that."""
        began, prefix = time.monotonic(), self._server.shm_prefix
        code = self._server.stop()
        left = [path.name for path in Path("/dev/shm").glob(f"{prefix}*")]
        print(f"the server ended with {code} after {time.monotonic() - began:.1f} s", file=sys.stderr)
        if code:
            left.append(f"exit code {code}, after {self._server.log_lines()[-_LAST_LOG_LINES:]}")
        return left


_PREPARE_REPOSITORY = server_files.prepare_repository


class _Talk:
    """One request over a stream of its own."""

    def __init__(self, heard: Heard, note: Callable[[], None], leave_at: int, slow: float) -> None:
        self._heard, self._note, self._leave_at, self._slow = heard, note, leave_at, slow

    async def over_grpc(
        self,
        client: grpc.InferenceServerClient,
        own: str,
        tensors: dict[str, Any],
        parameters: dict[str, Any],
        stream: bool,
    ) -> None:
        """own: an address, for a connection that nobody else uses and that is closed by the caller who leaves."""
        if own:
            client = grpc.InferenceServerClient(own)
        inputs = [
            tensor(name, value)
            for name, value in {"stream": stream, **_WANTED, "exclude_input_in_output": True, **tensors}.items()
        ]

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {
                "model_name": MODEL,
                "inputs": inputs,
                "enable_empty_final_response": True,
                "parameters": parameters or None,
            }

        responses = client.stream_infer(requests())
        try:
            async for result, error in responses:
                # the end; the stream is read on until the server closes it, for leaving now is what 2.51.0 does not
                # survive
                if error is not None:
                    self._heard.after_final += bool(self._heard.finals or self._heard.error)
                    self._heard.error = error.message()
                    continue
                self._take_grpc(result)
                if await self._enough():
                    return
        finally:
            if not self._heard.finals and not self._heard.error:  # whoever has heard the end does not leave
                responses.cancel()
            if own:
                await client.close()

    async def over_http(self, url: str, tensors: dict[str, Any], parameters: dict[str, Any], stream: bool) -> None:
        """generate or generate_stream. The connection closes when the caller leaves."""
        fields: dict[str, Any] = {"stream": stream, "exclude_input_in_output": True, **_WANTED, **tensors}
        arrays = {name: tensor_array(name, value).tolist() for name, value in fields.items()}
        body = {name: values[0] if len(values) == 1 else values for name, values in arrays.items()}
        verb = "generate_stream" if stream else "generate"
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(force_close=True), read_bufsize=2**24
        ) as session:
            async with session.post(
                f"{url}/v2/models/{MODEL}/{verb}", json={**body, **({"parameters": parameters} if parameters else {})}
            ) as response:
                async for event in _events(response, stream):
                    self._take_http(event)
                    if await self._enough():
                        return
        if not self._heard.error:
            self._heard.finals = 1  # over HTTP the end of the stream is all there is

    async def _enough(self) -> bool:
        if self._leave_at and self._heard.num_tokens >= self._leave_at and not self._heard.finals:
            return True
        if self._slow:
            await asyncio.sleep(self._slow)
        return False

    def _take_grpc(self, result: Any) -> None:
        heard = self._heard
        heard.after_final += bool(heard.finals)
        heard.finals += result.get_response().parameters["triton_final_response"].bool_param
        self._note()
        if result.as_numpy("text_output") is not None:
            self._take(
                {name: result.as_numpy(name).tolist() for name in _COLUMNS}
                | {"logprobs": _maybe(result.as_numpy("logprobs"))}
            )
            self._take_prompt(_maybe(result.as_numpy("prompt_logprobs")))

    def _take_http(self, event: dict[str, Any]) -> None:
        self._note()
        if "error" in event:
            self._heard.error = event["error"]
            return
        columns = {name: event[name] if isinstance(event[name], list) else [event[name]] for name in _COLUMNS}
        logprobs = event.get("logprobs")
        self._take(columns | {"logprobs": logprobs if isinstance(logprobs, list) or logprobs is None else [logprobs]})

        prompt = event.get("prompt_logprobs")
        self._take_prompt(prompt if isinstance(prompt, list) or prompt is None else [prompt])

    def _take_prompt(self, told: list[Any] | None) -> None:
        if told is not None:
            places = [place for place in json.loads(_text(told[0])) if place is not None]
            self._heard.prompts.append(
                [{int(token): entry["logprob"] for token, entry in place.items()} for place in places]
            )

    def _take(self, columns: dict[str, Any]) -> None:
        start = 0
        for position, index in enumerate(columns["sequence_index"]):
            count = columns["num_output_tokens"][position]
            ids = columns["output_ids"][start : start + count]
            reason = _text(columns["finish_reason"][position])
            logprobs = [] if columns["logprobs"] is None else _chosen(columns["logprobs"][position], ids)
            self._heard.add(
                index, _text(columns["text_output"][position]), ids, logprobs, None if reason == "None" else reason
            )
            start += count


_COLUMNS = ("sequence_index", "text_output", "num_output_tokens", "finish_reason", "output_ids")


async def _events(response: aiohttp.ClientResponse, stream: bool) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of an HTTP answer. An answer that breaks off is an error, says aiohttp."""
    if not stream or response.status != 200:
        text = await response.text()
        yield json.loads(text.removeprefix("data: "))
        return
    async for line in response.content:
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


def _chosen(logprobs: Any, ids: list[int]) -> list[float]:
    return [entry[str(token_id)]["logprob"] for entry, token_id in zip(json.loads(_text(logprobs)), ids, strict=True)]


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _maybe(array: Any) -> Any:
    return None if array is None else array.tolist()


def _is_broken_connection(message: str) -> bool:
    return any(words in message for words in _BROKEN_CONNECTION)


def _slashed(series: str) -> str:
    """`name{label="value"}` -> `name/value`, as the front-end door says it; whichever replica it is of."""
    name, _, labels = series.partition("{")
    values = [label.partition("=")[2] for label in labels.rstrip("}").split(",") if not label.startswith("replica=")]
    return f"{name}/{''.join(values).strip(chr(34))}"


def _command(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def resident_bytes(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    return 0


def count_of(folder: str) -> int:
    with suppress(OSError):
        return len(os.listdir(folder))
    return 0
