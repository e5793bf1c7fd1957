"""Prompts to token ids in the gateway, with the model's own tokenizer and chat template: a router must know what a
prompt begins with.

The server's own code does it, on threads. What cannot be tokenised here is sent as it came, and the server says what is
wrong with it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paged_backend.config import DEMO_MODEL, EngineConfig, demo_model_folder
from paged_backend.errors import RequestError
from paged_backend.frontend.prompt import PromptReader
from paged_backend.messages import Ready
from paged_backend.request import Chat, Outputs, Request, parse_sampling
from paged_client.cluster.servers import Servers
from paged_client.errors import PagedError
from paged_client.question import Question

PROMPT_TENSORS = ("text_input", "input_ids", "messages", "tools", "add_generation_prompt", "continue_final_message")
_TOKEN_KEYS = ("add_special_tokens", "truncate_prompt_tokens")
_UNLIMITED = 2**31 - 1  # the server keeps its limits itself
_EXPORT = (
    "import sys, pathlib; from paged_backend.models.tokenizer import export_tokenizer; "
    "export_tokenizer(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))"
)
_FILES = (
    "tokenizer*",
    "*.model",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "config.json",
)

log = logging.getLogger("paged.cluster")


class GatewayTokenizer:
    """Thread-safe."""

    def __init__(self, reader: PromptReader, folder: tempfile.TemporaryDirectory[str]) -> None:
        self._reader = reader
        self._folder = folder  # lives as long

    @classmethod
    def load(cls, model: str) -> GatewayTokenizer | None:
        """model: a checkpoint's folder or hub id, as the servers have it. Takes seconds: transformers is asked in a
        process of its own, as the engine asks it.

        None: the checkpoint is not here, or it has no tokenizer; the log says which.
        """
        found = _folder_of(model)
        if found is None:
            log.warning("%s is not on this machine: servers are asked to tokenise; --tokenizer names a folder", model)
            return None
        folder = tempfile.TemporaryDirectory(prefix="paged-tokenizer-")
        path = Path(folder.name) / "tokenizer.json"
        done = subprocess.run(
            [sys.executable, "-c", _EXPORT, str(found), str(path)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0 or not path.exists():
            reason = (done.stderr.strip().splitlines() or ["there is none"])[-1]
            log.warning("servers are asked to tokenise: the tokenizer of %s cannot be used here: %s", model, reason)
            return None
        config = EngineConfig(max_prompt_bytes=_UNLIMITED)
        ready = Ready(str(path), _UNLIMITED, _UNLIMITED, _UNLIMITED, config.page_size, _UNLIMITED)
        return cls(PromptReader(config, ready), folder)

    async def ids_of(
        self, tensors: Mapping[str, Any], template_kwargs: Mapping[str, Any] | None = None
    ) -> list[int] | None:
        """The prompt's token ids; None: it cannot be tokenised here. tensors: of a Question. template_kwargs: for a
        chat template.
        """
        if "input_ids" in tensors:
            return list(tensors["input_ids"])
        return await asyncio.to_thread(self._read, tensors, template_kwargs or {})

    def _read(self, tensors: Mapping[str, Any], template_kwargs: Mapping[str, Any]) -> list[int] | None:
        continues = bool(tensors.get("continue_final_message"))
        opens = tensors.get("add_generation_prompt")
        chat = None
        if "messages" in tensors:
            chat = Chat(
                messages=tensors["messages"],
                tools=tensors.get("tools"),
                add_generation_prompt=not continues if opens is None else bool(opens),
                template_kwargs=template_kwargs,
                continue_final_message=continues,
            )
        try:
            sampling = parse_sampling(json.loads(tensors.get("sampling_parameters", "{}")))
        except RequestError:
            return None
        request = Request(
            text=tensors.get("text_input"),
            input_ids=None,
            chat=chat,
            sampling=sampling,
            outputs=Outputs(),
            stream=True,
            prepend_prompt=False,
            arrival=time.monotonic(),
        )
        try:
            ids: list[int] = self._reader.read(request).token_ids.tolist()
        except RequestError:
            return None
        return ids

    def close(self) -> None:
        self._reader.close()
        self._folder.cleanup()


class ServerTokenizer:
    """Asks a server what the tokens are, where the tokenizer is not here or not yet: a round trip more for each
    request.
    """

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._next_choice = itertools.count()

    async def ids_of(
        self, tensors: Mapping[str, Any], template_kwargs: Mapping[str, Any] | None = None
    ) -> list[int] | None:
        """As GatewayTokenizer.ids_of."""
        if "input_ids" in tensors:
            return list(tensors["input_ids"])
        ready = self._servers.ready()
        if not ready:
            return None
        asked = {name: tensors[name] for name in PROMPT_TENSORS if name in tensors}
        given = json.loads(tensors.get("sampling_parameters", "{}"))
        sampling = {name: given[name] for name in _TOKEN_KEYS if given.get(name) is not None}
        if template_kwargs:
            sampling["chat_template_kwargs"] = template_kwargs
        if sampling:
            asked["sampling_parameters"] = json.dumps(sampling, ensure_ascii=False)
        question = Question(
            {"task": "tokenize", "stream": False, "return_finish_reason": True, **asked}, {"return_error_code": True}
        )
        try:
            async with ready[next(self._next_choice) % len(ready)].connection.ask(question) as stream:
                async for _ in stream:
                    pass
        except PagedError:  # what is wrong with it is said when it is asked
            return None
        return list(stream.answer.token_ids) or None


def _folder_of(model: str) -> Path | None:
    if model == DEMO_MODEL:
        return demo_model_folder()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, allow_patterns=list(_FILES)))
    except Exception as error:  # no such model, no network, no permission: the library has many words for it
        log.warning("%s: %s", model, (str(error).splitlines() or [type(error).__name__])[0])
        return None
