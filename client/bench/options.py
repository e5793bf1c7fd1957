"""The options of `paged bench` and `paged bench memory`, in groups, and the plans that they make."""

from __future__ import annotations

import os
import secrets
import time
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Annotated

import typer

from paged_backend.errors import EngineError
from paged_backend.server.launch import ServerSettings
from paged_client.bench.load import Level, LoadLimits
from paged_client.bench.session import Session
from paged_client.bench.workload import Span, Workload
from paged_client.settings import parse_options

_LEAST_REQUESTS = 8
_CONCURRENCY = "1,8,64"
_MOST_STREAMS = 4096

TemperatureOption = Annotated[float, typer.Option(metavar="T", min=0, max=2, help="Of the sampling; 0 is greedy.")]


@dataclass(frozen=True)
class Addresses:
    """Where to measure."""

    url: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="gRPC of a running server; without it one is started for the time."),
    ] = None
    model_name: Annotated[str, typer.Option(metavar="NAME", help="What the server calls the model.")] = "paged_llm"
    metrics_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="The server's Prometheus page; default: port 8002 of the same host, /metrics."
        ),
    ] = None
    against: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="gRPC of a second server, measured in alternation with the first."),
    ] = None
    against_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The second server's model; default: --model-name.")
    ] = None
    against_metrics_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="The second server's Prometheus page; default: port 8002 if it is another host."
        ),
    ] = None

    def check(self) -> None:
        """Refuses what cannot be meant.

        Raises:
            EngineError: something is said of a second server, and there is none.
        """
        for option, value in (
            ("--against-model", self.against_model),
            ("--against-metrics-url", self.against_metrics_url),
        ):
            if self.against is None and value is not None:
                raise EngineError(f"{option} {value}: goes with --against, the second server's address")


@dataclass(frozen=True)
class StartedServer:
    """The server that is started for the time."""

    model: Annotated[
        str, typer.Option("--model", "-m", metavar="FOLDER_OR_HUB_ID", help="What the server that is started serves.")
    ] = "demo"
    options: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="A tunable of the server that is started; repeatable."),
    ] = None
    instances: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=64, help="Front ends of the server that is started.")
    ] = None

    def settings(self) -> ServerSettings:
        """Reads the tunables.

        Raises:
            EngineError: an option is none of the server's, or has no such value.
        """
        return ServerSettings(self.model, parse_options(self.options or []), instances=self.instances)

    def refuse_with_url(self) -> None:
        """Refuses options of a server that is not started.

        Raises:
            EngineError: one of them is given, though a running server is measured.
        """
        given = {
            "--model": self.model != "demo",
            "--set": bool(self.options),
            "--instances": self.instances is not None,
        }
        for option, is_given in given.items():
            if is_given:
                raise EngineError(
                    f"{option}: is for a server that paged bench starts, and --url names one that runs already"
                )


@dataclass(frozen=True)
class LoadOptions:
    """How many requests are sent, and when."""

    concurrency: Annotated[
        str | None,
        typer.Option("--concurrency", "-c", metavar="N,N,…", help="Streams at once, one run each; default: 1,8,64."),
    ] = None
    rates: Annotated[
        str | None,
        typer.Option("--rates", "-r", metavar="R,R,…", help="Instead: requests a second at random (Poisson) times."),
    ] = None
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests",
            "-n",
            metavar="N",
            min=1,
            help="Requests a run; default: 4 for each stream, or --seconds of a rate; 8 at least.",
        ),
    ] = None
    seconds: Annotated[
        float, typer.Option(metavar="S", min=1, help="How long requests are sent at each of --rates.")
    ] = 30.0

    def levels(self) -> list[tuple[Level, int]]:
        """Levels in the order given, each with its number of requests.

        Raises:
            EngineError: an option is wrong.
        """
        requests = self.requests
        if self.rates is not None and self.concurrency is not None:
            raise EngineError("--rates and --concurrency: give one of them")
        levels = []
        for rate in numbers_of("--rates", self.rates) if self.rates is not None else ():
            if requests is not None and requests < rate:
                raise EngineError(f"--requests {requests}: expected a second's worth of the rate ({rate:g}), or more")
            levels.append((Level(rate=rate), requests or max(ceil(rate * self.seconds), _LEAST_REQUESTS)))
        if levels:
            return levels
        for value in numbers_of("--concurrency", self.concurrency or _CONCURRENCY):
            streams = int(value)
            if streams != value or streams > _MOST_STREAMS:
                raise EngineError(f"--concurrency {value:g}: expected whole numbers from 1 to {_MOST_STREAMS}")
            if requests is not None and requests < streams:
                raise EngineError(f"--requests {requests}: expected as many as there are streams ({streams}), or more")
            levels.append((Level(streams=streams), requests or max(4 * streams, _LEAST_REQUESTS)))
        return levels


@dataclass(frozen=True)
class TrafficOptions:
    """What requests are like."""

    input_tokens: Annotated[
        str, typer.Option(metavar="N or LOW:HIGH", help="Length of prompts: fixed, or uniform in a range.")
    ] = "128"
    output_tokens: Annotated[
        str, typer.Option(metavar="N or LOW:HIGH", help="Length of answers (max_tokens with ignore_eos).")
    ] = "256"
    sharegpt: Annotated[
        bool, typer.Option("--sharegpt", help="ShareGPT-like lengths instead: log-normal, means 161 in and 338 out.")
    ] = False
    longest: Annotated[
        int,
        typer.Option(
            metavar="N", min=2, help="With --sharegpt: the longest prompt plus answer; each is cut at half of it."
        ),
    ] = 2048
    shared_prefix: Annotated[
        int, typer.Option(metavar="N", min=0, help="Tokens in front of every prompt that are the same for all.")
    ] = 0
    prefixes: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many different shared prefixes there are, used in turn.")
    ] = 1
    temperature: TemperatureOption = 0.0

    def workload(self, seed: int) -> Workload:
        """Reads the lengths.

        Raises:
            EngineError: an option is wrong.
        """
        prompt = Span.parse("--input-tokens", self.input_tokens)
        answer = Span.parse("--output-tokens", self.output_tokens)
        if self.prefixes > 1 and not self.shared_prefix:
            raise EngineError(f"--prefixes {self.prefixes}: goes with --shared-prefix, their length")
        return Workload(
            None if self.sharegpt else prompt,
            None if self.sharegpt else answer,
            self.longest,
            self.shared_prefix,
            self.prefixes,
            self.temperature,
            seed,
            secrets.randbits(32),
        )


@dataclass(frozen=True)
class SessionOptions:
    """Limits of each run, and what becomes of the results."""

    processes: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=64,
            help="perf_analyzer processes that share the load; default: one for each 64 streams while a quarter of the "
            "cores allows.",
        ),
    ] = None
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="The longest that one run may take; it is then broken off.")
    ] = 600.0
    seed: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="The same seed sends requests of the same lengths; their tokens are new each time."
        ),
    ] = 0
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw pictures (needs matplotlib).")] = True
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="Where results.json, results.csv and pictures go; default: a new one here, named by date and time.",
        ),
    ] = None

    def session(self, name: str) -> Session:
        """Opens a session whose results go to a new folder of that name if none is given."""
        limits = LoadLimits(self.processes, self.timeout, len(os.sched_getaffinity(0)))
        return Session(self.out or Path(f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"), self.plots, limits)


@dataclass(frozen=True)
class PoolOptions:
    """The KV memory that is compared."""

    max_model_len: Annotated[
        int,
        typer.Option(
            metavar="N", min=32, help="Longest sequence; a reserved sequence holds room for that many tokens."
        ),
    ] = 2048
    page_size: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens a page of the paged pool.")] = 16
    pool_sequences: Annotated[
        int, typer.Option(metavar="N", min=1, help="KV memory of both, in sequences of --max-model-len.")
    ] = 8


def numbers_of(option: str, text: str) -> list[float]:
    """ "1,8,64" as distinct positive numbers."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise EngineError(f"{option} {text}: expected numbers with commas between them, such as 1,8,64") from None
    if not all(0 < number < float("inf") for number in numbers):
        raise EngineError(f"{option} {text}: expected numbers above 0")
    return list(dict.fromkeys(numbers))
