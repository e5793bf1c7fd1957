"""Every tunable of the engine, declared once: name, default, meaning. `config.pbtxt` and `paged serve --set` speak
these names.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from paged_backend.errors import EngineError
from paged_backend.units import read_bytes

DEMO_MODEL = "demo"

MODEL_PROPOSERS = ("draft", "mtp", "eagle3")
"""Kinds of speculation that a model guesses for."""

Bytes = Annotated[int, BeforeValidator(lambda value: read_bytes(value) if isinstance(value, str) else value)]
"""A number of bytes, or a string with a unit."""


class EngineConfig(BaseModel):
    """The engine's options. Frozen; unknown names are refused with the nearest valid one.

    Sizes are in bytes, lengths in tokens, times in seconds unless the name says otherwise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str = Field(
        DEMO_MODEL,
        min_length=1,
        description="Folder or hub id of a Hugging Face checkpoint; 'demo' is the model that comes with paged.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of weights and activations; auto: the checkpoint's own on a GPU, float32 on a CPU."
    )
    quantization: Literal["none", "fp8", "int4"] = Field(
        "none",
        description="Round a checkpoint of floats while it is read. fp8: a scale a row, activations per token; "
        "int4: groups of 128, loses quality. "
        "A quantised checkpoint needs no option.",
    )
    load_format: Literal["auto", "dummy"] = Field(
        "auto", description="auto: safetensors; dummy: random weights from config.json alone, for benchmarks."
    )
    page_size: int = Field(
        16,
        ge=1,
        description="Tokens a page: the unit in which KV memory is handed out. A power of two, or max_model_len "
        "itself (one page a sequence: reservation).",
    )
    num_pages: int = Field(
        0,
        ge=0,
        description="Pages in the pool; 0 sizes it from memory. With several KV groups a page is of one group's "
        "layers: page_size tokens take one for each.",
    )
    pool_memory_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of the memory left after weights and the largest step that the pool takes; unset: 0.9 "
        "on a GPU, 0.25 on a CPU.",
    )
    pool_bytes: Bytes = Field(0, ge=0, description="Size of the pool, such as 4GiB; 0: pool_memory_fraction decides.")
    kv_dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8_e4m3"] = Field(
        "auto",
        description="Type of the KV store; auto: same as dtype. fp8_e4m3: half of bfloat16's bytes, twice the "
        "tokens; K and V keep 4 significant bits.",
    )
    max_model_len: int = Field(
        0,
        ge=0,
        description="Longest sequence, prompt and answer together; 0: what the checkpoint was trained for, less if "
        "the pool is smaller.",
    )
    max_num_sequences: int = Field(
        0,
        ge=0,
        le=4096,
        description="Sequences that may run at once; 0: 1024 or 512 where a GPU has the memory (the log says why), "
        "else 256.",
    )
    max_batched_tokens: int = Field(
        2048, ge=1, description="Token budget of one step; longer prompts are computed in chunks."
    )
    max_step_seconds: float = Field(
        0.2,
        ge=0,
        le=3600,
        description="While some sequence decodes, a step has only as many prompt tokens as are expected to end within "
        "so many seconds, at least 32; what steps take is measured while serving. 0: as many as fit into "
        "max_batched_tokens.",
    )
    max_queue_size: int = Field(4096, ge=1, description="Requests that may wait; one more is refused as UNAVAILABLE.")
    max_waiting_seconds: float = Field(
        600.0, gt=0, description="A request that has not started after this long is refused as UNAVAILABLE."
    )
    request_deadline_seconds: float = Field(
        3600.0, gt=0, description="A request still running after this long is ended as CANCELLED, its pages freed."
    )
    prefix_cache: bool = Field(
        True, description="Keep full pages of finished sequences and share them with requests that begin alike."
    )
    kv_events: str = Field(
        "",
        description="Where routers hear which pages the prefix cache has: a port of 127.0.0.1, tcp://ADDRESS:PORT "
        "or ipc://PATH; empty: nowhere. "
        "They ask at the next port, or PATH.replay, for what they missed. Events hold the tokens of prompts and "
        "answers.",
    )
    preemption: bool = Field(
        True,
        description="With no page left, take the youngest sequence's and recompute it later; off: start a sequence "
        "only when its longest answer fits.",
    )
    default_max_tokens: int = Field(256, ge=1, description="max_tokens of a request that names none.")
    generation_defaults: bool = Field(
        False,
        description="Take what a request leaves open of sampling from the checkpoint's generation_config.json, as "
        "`vllm serve` does; requests may say.",
    )
    max_prompt_bytes: Bytes = Field(
        4_194_304,
        ge=1,
        description="Longest prompt text in bytes, or such as 4MiB; longer ones are refused before tokenisation.",
    )
    lora_directory: str = Field(
        "",
        description="Folder of LoRA adapters as PEFT saves them, one folder each: lora_name names one. Empty: none "
        "are served.",
    )
    max_loras: int = Field(
        8,
        ge=1,
        le=256,
        description="Adapters that the device has room for at once; others are read when they are asked for.",
    )
    max_lora_rank: int = Field(
        64, ge=1, le=512, description="Largest rank of an adapter; memory for max_loras of them is set aside."
    )
    cuda_graphs: bool = Field(True, description="Capture decode steps as CUDA graphs (no effect on a CPU).")
    stream_max_delay_ms: float = Field(
        50.0,
        ge=0,
        description="Longest time in milliseconds that text which is ready may wait to be joined with later text "
        "when the sender falls behind.",
    )
    speculation: Literal["off", "ngram", "draft", "mtp", "eagle3", "auto"] = Field(
        "auto",
        description="Guess a sequence's next tokens and check them in one step; no token changes. ngram: what came "
        "after the same words earlier in its text. draft: what draft_model would say. mtp: what the "
        "checkpoint's layer of multi-token prediction says. eagle3: what an EAGLE-3 head says (draft_model). "
        "auto: the best of these that there is, as far as it is measured to pay.",
    )
    draft_model: str = Field(
        "",
        description="Folder of a small checkpoint with the model's vocabulary, which guesses for speculation=draft, "
        "or of an EAGLE-3 head; empty: the head in the folder draft_head of the model's own, if it has one. Its "
        "weights, and its K and V beside the model's, take memory.",
    )
    num_speculative_tokens: int = Field(
        4, ge=1, le=15, description="Guesses of a sequence in a step, at most; fewer while they are wrong."
    )
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto: cuda if there is one, else cpu."
    )
    tensor_parallel_size: int = Field(
        1,
        ge=1,
        le=64,
        description="GPUs that share the model, a process each, from `device` on: 2, 4, 8; what divides the heads. "
        "On a CPU: processes.",
    )
    replicas: int = Field(
        1,
        ge=1,
        le=64,
        description="Engines of this model beside each other, each with tensor_parallel_size GPUs, pages and requests "
        "of its own. On a CPU: processes.",
    )
    gpus: str = Field(
        "",
        description="Which GPUs, such as 0,1 or their UUIDs: the first replica's ranks, then the next one's. Empty: "
        "those that are visible, from `device` on.",
    )
    fused_all_reduce: bool = Field(
        True,
        description="Sum the ranks' products of few tokens, and the residual, in one kernel over memory that all "
        "GPUs read, instead of NCCL; where they cannot, NCCL does it.",
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="Seeds the random numbers of requests that bring no seed of their own."
    )
    max_engine_restarts: int = Field(
        8,
        ge=0,
        description="Restarts within ten minutes of an engine that died; one more death and the model is not ready "
        "any more. Live requests go on.",
    )
    on_engine_loss: Literal["unload", "exit", "stay"] = Field(
        "unload",
        description="When there are no more restarts. unload: the server unloads the model, if its "
        "--model-control-mode is explicit; exit: it ends, so that "
        "an orchestrator starts it again (the default of `paged serve`); stay: the model stays loaded and "
        "refuses every request.",
    )
    standby_engine: bool = Field(
        True,
        description="Keep a second process that has imported everything, to take a dead engine's place: some 300 "
        "MB of memory, none of the device's.",
    )
    engine_hang_seconds: float = Field(
        300.0,
        ge=0,
        description="An engine that says nothing for this long, which no step may take, is killed and restarted; "
        "0: never.",
    )
    debug_checks: bool = Field(
        False,
        description="Check every step's page tables and the whole pool before it runs, and stop the engine at the "
        "first mistake; slow, for tests.",
    )
    otlp_traces_endpoint: str = Field(
        "",
        description="URL of an OpenTelemetry collector (OTLP) that is told of every request as spans, such as "
        "http://localhost:4318; empty: where the "
        "variables OTEL_EXPORTER_OTLP_* say, or nowhere. Lengths, times and options, never text.",
    )
    log_requests: bool = Field(
        False, description="Log one line per finished request: its id, lengths and times, never text."
    )
    replica: int = Field(0, ge=0, description="Which of the replicas an engine is: told by its front ends, no tunable.")

    @model_validator(mode="after")
    def _page_size_is_a_power_of_two(self) -> EngineConfig:
        if self.page_size & (self.page_size - 1) and self.page_size != self.max_model_len:
            longest = f" ({self.max_model_len})" if self.max_model_len else ""
            raise ValueError(f"page_size: {self.page_size} is neither a power of two nor max_model_len{longest}")
        return self

    @model_validator(mode="after")
    def _there_are_gpus_for_all(self) -> EngineConfig:
        names, needed = gpu_names(self.gpus), self.replicas * self.tensor_parallel_size
        if len(set(names)) < len(names) or not all(names):
            raise ValueError(f"gpus: expected different numbers or UUIDs with commas between them, got '{self.gpus}'")
        if names and self.device == "cpu":
            raise ValueError(f"gpus: {self.gpus} are named, and the device is the CPU")
        if names and len(names) < needed:
            raise ValueError(
                f"gpus: {spell_shares(self.replicas, self.tensor_parallel_size)} need {needed} GPUs, "
                f"{len(names)} are named ({self.gpus})"
            )
        return self

    @model_validator(mode="after")
    def _one_engine_tells_routers(self) -> EngineConfig:
        if self.kv_events and self.replicas > 1:
            raise ValueError(f"kv_events: routers listen to one engine, replicas must be 1, not {self.replicas}")
        return self

    @model_validator(mode="after")
    def _a_proposer_has_its_checkpoint(self) -> EngineConfig:
        if self.draft_model and self.speculation not in ("draft", "eagle3", "auto"):
            raise ValueError(
                f"draft_model: is unused with speculation={self.speculation}; speculation=draft, eagle3 or auto takes "
                "one"
            )
        if self.speculation == "draft" and not self.draft_model:
            raise ValueError("draft_model: is empty; speculation=draft needs one")
        if (self.draft_model or self.speculation in MODEL_PROPOSERS) and self.tensor_parallel_size > 1:
            raise ValueError(
                f"speculation: {self.speculation} is for one GPU a replica, tensor_parallel_size must be 1, not "
                f"{self.tensor_parallel_size}"
            )
        return self

    @field_validator("kv_events")
    @classmethod
    def _kv_events_is_an_address(cls, value: str) -> str:
        kv_event_addresses(value)
        return value

    @field_validator("otlp_traces_endpoint")
    @classmethod
    def _otlp_traces_endpoint_is_a_url(cls, value: str) -> str:
        if value and not value.startswith(("http://", "https://")):
            raise ValueError("expected http://HOST:PORT or https://HOST:PORT")
        return value

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> EngineConfig:
        """Checks `options` (name → value; values may be strings, as in config.pbtxt).

        Raises:
            EngineError: one sentence that names the option, the value and what is allowed.
        """
        for name in options:
            if name not in TUNABLES:
                nearest = difflib.get_close_matches(name, TUNABLES, n=1, cutoff=0.0)
                raise EngineError(f"unknown parameter '{name}': did you mean '{nearest[0]}'?")
        try:
            return cls.model_validate({name: value for name, value in options.items() if value != ""})
        except ValidationError as error:
            first = error.errors()[0]
            if not first["loc"]:
                raise EngineError(first["msg"].removeprefix("Value error, ")) from None
            raise EngineError(
                f"parameter '{first['loc'][0]}': {first['msg'].removeprefix('Value error, ')}, got {first['input']!r}"
            ) from None

    @property
    def num_drafts(self) -> int:
        """Of a sequence in a step, at most; 0: no speculation."""
        return 0 if self.speculation == "off" else self.num_speculative_tokens

    def model_folder(self) -> Path | None:
        """The checkpoint's folder if `model` names one on this machine, else None (a hub id)."""
        if self.model == DEMO_MODEL:
            return demo_model_folder()
        folder = Path(self.model).expanduser()
        return folder if folder.is_dir() else None


TUNABLES = {name: field for name, field in EngineConfig.model_fields.items() if name != "replica"}
"""What operators may set."""


def gpu_names(gpus: str) -> list[str]:
    """The entries of the option `gpus`."""
    return [name.strip() for name in gpus.split(",")] if gpus else []


def spell_shares(num_replicas: int, size: int) -> str:
    """`2 replicas of 4 ranks`, `2 ranks`."""
    ranks = f"{size} ranks" if size > 1 else "a rank"
    return ranks if num_replicas == 1 else f"{num_replicas} replicas of {ranks}"


def kv_event_addresses(kv_events: str) -> tuple[str, str] | None:
    """Where KV events are published, and where a subscriber asks for those it missed, as ZeroMQ addresses; None: the
    option is empty.

    Raises:
        ValueError: it is no address.
    """
    if not kv_events:
        return None
    if kv_events.startswith("ipc://") and kv_events != "ipc://":
        return kv_events, f"{kv_events}.replay"
    host, _, port = (f"tcp://127.0.0.1:{kv_events}" if kv_events.isdecimal() else kv_events).rpartition(":")
    if not host.startswith("tcp://") or host == "tcp://" or not port.isdecimal() or not 0 < int(port) < 65535:
        raise ValueError("expected a port up to 65534, tcp://ADDRESS:PORT or ipc://PATH")
    return f"{host}:{port}", f"{host}:{int(port) + 1}"


def demo_model_folder() -> Path:
    """Where the model that comes with paged lies: in the model repository, beside model.py."""
    return repository_folder() / "paged_llm" / "1" / "demo_model"


def repository_folder() -> Path:
    """The model repository: installed as package data `paged_model_repository`, or the checkout's own folder."""
    spec = find_spec("paged_model_repository")
    places = (spec.submodule_search_locations or ()) if spec else ()
    # pip may leave an empty one behind
    folders = [Path(place) for place in places if (Path(place) / "paged_llm" / "config.pbtxt").is_file()]
    if not folders:
        raise EngineError("the model repository is not installed: reinstall paged-backend")
    return folders[0]
