"""Triton Server's side of a front end, and the only importer of its Python library: tensors to Request, Delta to
response, errors to codes, metrics.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import msgspec
import numpy as np
import triton_python_backend_utils as pb_utils

from paged_backend.config import EngineConfig
from paged_backend.engine_client.starter import engine_command
from paged_backend.errors import EngineError, ErrorKind, RequestError
from paged_backend.frontend.delta import Delta, Embedding
from paged_backend.frontend.engine_loss import leave_server
from paged_backend.frontend.front_end import FrontEnd
from paged_backend.frontend.metrics import FAMILIES, Family, Kind, Series, Tally
from paged_backend.frontend.model_config import check_tensors, may_stream
from paged_backend.frontend.prompt_logprobs import PromptTable
from paged_backend.frontend.request_reader import asks_for_health, id_parameter, read_request, wants_error_code
from paged_backend.frontend.response_tensors import ResponseTensors, ThreadsTensors
from paged_backend.frontend.server_death import end_with_server, leave_soon
from paged_backend.frontend.shared_memory import keep_shared_memory_private
from paged_backend.frontend.shutdown_watch import Departure, ServerArguments
from paged_backend.frontend.streamer import Send
from paged_backend.log_lines import LogLines
from paged_backend.messages import MODEL_NAME, TokenScores
from paged_backend.process_id import ProcessId
from paged_backend.request import Outputs, Request

_PUBLISH_SECONDS = 0.25
_PUBLISH_ALARM_SECONDS = 30  # a publication takes milliseconds
_OBJECTS_BETWEEN_COLLECTIONS = 50_000

_CODES = {  # by name: the stub adds its classes to the library only after it has imported the model
    ErrorKind.INVALID: "INVALID_ARG",
    ErrorKind.OVERLOADED: "UNAVAILABLE",
    ErrorKind.CANCELLED: "CANCELLED",
    ErrorKind.INTERNAL: "INTERNAL",
    ErrorKind.UNSUPPORTED: "UNSUPPORTED",
}
_GRPC_NAMES = {"INVALID_ARG": "INVALID_ARGUMENT", "UNSUPPORTED": "UNIMPLEMENTED"}


class TritonPythonModel:
    """One instance of the model: a front end of the engine that all instances share."""

    engine_command: Sequence[str] | None = None  # tests put another engine here

    def initialize(self, args: Mapping[str, str]) -> None:
        """
        Raises:
            TritonModelException: one sentence that says why the model cannot be served.
        """
        try:
            self._begin(args)
        except BaseException:
            leave_soon()
            raise

    def _begin(self, args: Mapping[str, str]) -> None:
        name, version = args["model_name"], args["model_version"]
        _log_to_stderr(name)
        end_with_server()
        keep_shared_memory_private()
        model_config = json.loads(args["model_config"])
        self._may_stream = may_stream(model_config)
        try:
            check_tensors(model_config)
            config = EngineConfig.parse(engine_options(model_config["parameters"]))
            num_instances = _num_instances(model_config)
            command = self.engine_command or [*engine_command(), f"{MODEL_NAME}{name}"]
            server = ServerArguments.of(os.getppid())
            leave = threading.Thread(
                target=leave_server,
                args=(config.on_engine_loss, server, os.getppid(), name),
                name="engine-loss",
                daemon=True,
            )
            self._front_end = FrontEnd(config, _key(args), num_instances, command, leave.start, name)
        except EngineError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        self._tensors = ThreadsTensors(pb_utils.Tensor)
        self._publisher = Publisher(self._front_end.tally, {"model": name, "version": version})
        if args["model_instance_name"].endswith("_0_0"):  # the first of them speaks for all
            _warn_of(model_config)
        spare_collector()
        self._departure = Departure(server, name, version, num_instances, self._front_end.drain)

    def execute(self, requests: Sequence[Any]) -> None:
        """Reads the requests and returns at once; each is answered through its own response sender."""
        for request in requests:
            self._accept(request)

    def is_ready(self) -> bool:
        """Asked by servers from 26.03 on."""
        return self._front_end.alive

    def finalize(self) -> None:
        """Waits for live requests, ends what is left after a while, and with the last front end the engine."""
        self._departure.close()
        self._front_end.close()
        self._publisher.close()

    def _accept(self, inference: Any) -> None:
        sender = inference.get_response_sender()
        parameters = inference.parameters()
        if asks_for_health(parameters):
            self._front_end.tell_health(self._send_bare(parameters, sender))
            return
        try:
            request = self._read(inference, parameters)
        except RequestError as error:
            self._front_end.refuse(error, self._send_bare(parameters, sender))
            return
        except Exception:
            logging.getLogger("paged").exception("a request could not be read")
            self._front_end.refuse(
                RequestError("the request could not be read", ErrorKind.INTERNAL), self._send_bare(parameters, sender)
            )
            return
        send = _send_to(sender, request.outputs, self._front_end.token_bytes, self._tensors)
        self._front_end.ask(request, send, sender.is_cancelled)

    def _read(self, inference: Any, parameters: str) -> Request:
        """
        Raises:
            RequestError: what the caller must change.
        """
        tensors = {tensor.name(): tensor.as_numpy() for tensor in inference.inputs()}
        request = read_request(tensors, parameters, time.monotonic(), self._front_end.generation_defaults)
        if request.stream and not self._may_stream:
            raise RequestError(
                "stream: true is not possible: a request has one response here (model_transaction_policy of "
                "config.pbtxt: decoupled: false)"
            )
        return msgspec.structs.replace(request, caller_id=inference.request_id() or id_parameter(parameters))

    def _send_bare(self, parameters: str, sender: Any) -> Send:
        """For an answer of which nothing is known but how its error is to be told."""
        outputs = Outputs(error_code=wants_error_code(parameters))
        return _send_to(sender, outputs, self._front_end.token_bytes, self._tensors)


def spare_collector() -> None:
    """Takes what the load left behind, which lives as long as the process, out of the garbage collector's sight, and
    calls it for thousands of objects at once: the pieces of a step of hundreds of streams are that many, they hold no
    cycles, and looking for some took a third of the time that a token takes here.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)


def engine_options(parameters: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """config.pbtxt's parameters without those of the Python backend itself, which are written in capitals
    (EXECUTION_ENV_PATH).
    """
    return {name: value["string_value"] for name, value in parameters.items() if not name.isupper()}


def _warn_of(model_config: Mapping[str, Any]) -> None:
    """Settings of config.pbtxt that Triton Server takes and that mean nothing here."""
    if model_config.get("max_batch_size"):
        text = (
            "max_batch_size: %d in config.pbtxt makes no batches, it only gives requests a batch dimension of 1: "
            "the engine batches by itself, so set it to 0"
        )
        logging.getLogger("paged").warning(text, model_config["max_batch_size"])


def _key(args: Mapping[str, str]) -> str:
    """Names this model in this server: instances with the same key share an engine. A stub's parent is the server."""
    server = ProcessId.of(os.getppid())
    return "\n".join([repr(server), args["model_repository"], args["model_name"], args["model_version"]])


def _num_instances(model_config: Mapping[str, Any]) -> int:
    return sum(
        group["count"] * max(1, len(group["gpus"]) if group["kind"] == "KIND_GPU" else 1)
        for group in model_config["instance_group"]
    )


def _send_to(
    sender: Any, outputs: Outputs, token_bytes: Callable[[int], bytes], threads_tensors: ThreadsTensors
) -> Send:
    only_text = outputs == Outputs()  # most responses by far

    def send(deltas: tuple[Delta, ...], final: bool) -> None:
        first, tensors = deltas[0], threads_tensors.own
        if only_text and len(deltas) == 1 and first.error is None and first.prompt is None:
            response = pb_utils.InferenceResponse([tensors.strings("text_output", (first.text,))])
        else:
            response = response_of(deltas, outputs, token_bytes, tensors)
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0)

    return send


def response_of(
    deltas: Sequence[Delta], outputs: Outputs, token_bytes: Callable[[int], bytes], response_tensors: ResponseTensors
) -> Any:
    """The InferenceResponse for deltas of several sequences, or one with an error: text_output always, the others as
    asked for, an entry per sequence.

    output_ids has the sequences' tokens end to end (num_output_tokens says how many are whose); num_input_tokens and
    num_cached_tokens have one entry, and so has prompt_logprobs, in one of a request's responses.
    """
    first = deltas[0]
    if first.error is not None:
        code = _CODES[first.error.kind]
        words = f"{_GRPC_NAMES.get(code, code)}: {first.error}" if outputs.error_code else str(first.error)
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(words, getattr(pb_utils.TritonError, code)))
    strings, numbers = response_tensors.strings, response_tensors.numbers
    tensors = [strings("text_output", [delta.text for delta in deltas])]
    if outputs.sequence_index:
        tensors.append(numbers("sequence_index", [delta.index for delta in deltas], np.int32))
    if outputs.finish_reason:
        tensors.append(strings("finish_reason", [str(delta.finish_reason) for delta in deltas]))
    if outputs.cumulative_logprob:
        tensors.append(numbers("cumulative_logprob", [delta.cumulative_logprob for delta in deltas], np.float32))
    if outputs.logprobs:
        spelled = _speller(token_bytes)
        lists = [_json_list(_logprob_entries(entry, spelled) for entry in delta.logprobs) for delta in deltas]
        tensors.append(strings("logprobs", lists))
    if isinstance(first.prompt, Embedding):
        tensors.append(pb_utils.Tensor("embedding", first.prompt.values))
    if outputs.prompt_logprobs:
        tables = [delta.prompt for delta in deltas if isinstance(delta.prompt, PromptTable)]
        tensors += [strings("prompt_logprobs", [_prompt_json(table, _speller(token_bytes))]) for table in tables]
    if outputs.num_input_tokens:
        tensors.append(numbers("num_input_tokens", [first.num_input_tokens], np.uint32))
    if outputs.num_output_tokens:
        tensors.append(numbers("num_output_tokens", [len(delta.token_ids) for delta in deltas], np.uint32))
    if outputs.output_ids:
        tensors.append(numbers("output_ids", [token_id for delta in deltas for token_id in delta.token_ids], np.int32))
    if outputs.num_cached_tokens:
        tensors.append(numbers("num_cached_tokens", [first.num_cached_tokens], np.uint32))
    return pb_utils.InferenceResponse(tensors)


def _logprob_entries(entry: TokenScores, spelled: Callable[[int], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """As NVIDIA's vLLM backend writes them."""
    return {
        str(token): {"logprob": logprob, "rank": rank, **spelled(token)} for token, (logprob, rank) in entry.items()
    }


def _prompt_json(prompt: PromptTable, spelled: Callable[[int], dict[str, Any]]) -> str:
    """As `logprobs`, with null for the first token, as vLLM has it."""
    remembered = cache(spelled)
    return _json_list(None if entry is None else _logprob_entries(entry, remembered) for entry in prompt.entries())


def _speller(token_bytes: Callable[[int], bytes]) -> Callable[[int], dict[str, Any]]:
    """How a token is told: its text, and its bytes where they are part of a character, which text cannot show."""

    def spelled(token_id: int) -> dict[str, Any]:
        spelling = token_bytes(token_id)
        try:
            return {"decoded_token": spelling.decode()}
        except UnicodeDecodeError:
            return {"decoded_token": spelling.decode(errors="replace"), "bytes": list(spelling)}

    return spelled


def _json_list(entries: Iterable[Any]) -> str:
    """Entry by entry: the library lets no other thread run meanwhile, and a long prompt's list has tens of
    megabytes.
    """
    return f"[{', '.join(map(json.dumps, entries))}]"


class Publisher:
    """Brings a tally's numbers to the server's `/metrics`, on a thread of its own."""

    def __init__(self, tally: Tally, labels: Mapping[str, str]) -> None:
        self._tally = tally
        self._server = os.getppid()
        # the server forgets a family that nobody refers to
        self._families = {family.name: _create(family) for family in FAMILIES}
        for created in self._families.values():
            _keep_for_ever(created)
        self._labels = labels
        # gauges of several replicas are each replica's own, and made when there is something to tell of it
        self._gauges: dict[tuple[int, Series], Any] = {}
        self._series = {
            (family.name, value): self._metric(family, value)
            for family in FAMILIES
            for value in family.values
            if family.kind is not Kind.GAUGE or tally.num_replicas == 1
        }
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Publishes the last numbers."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping.wait(_PUBLISH_SECONDS):
                self._publish_or_die()
            self._publish_or_die()
        except Exception:  # metrics are no reason to stop serving
            logging.getLogger("paged").exception("metrics cannot be published any more")

    def _publish_or_die(self) -> None:
        """A metric call to a server that was killed never returns, and as it holds the interpreter's lock, no other
        thread would ever notice: the alarm's default action ends the process instead.
        """
        if os.getppid() != self._server:
            return
        signal.alarm(_PUBLISH_ALARM_SECONDS)
        try:
            self._publish()
        finally:
            signal.alarm(0)

    def _publish(self) -> None:
        measurements = self._tally.drain()
        for replica, gauges in measurements.gauges.items():
            for series, value in gauges.items():
                self._gauge(replica, series).set(value)
        for series, amount in measurements.increments.items():
            if amount:
                self._of(series).increment(amount)
        for series, values in measurements.observations.items():
            for value in values:
                self._of(series).observe(value)

    def _of(self, series: Series) -> Any:
        return self._series[series]

    def _gauge(self, replica: int, series: Series) -> Any:
        if self._tally.num_replicas == 1:
            return self._series[series]
        if (replica, series) not in self._gauges:
            family = next(family for family in FAMILIES if family.name == series[0])
            self._gauges[replica, series] = self._metric(family, series[1], replica=str(replica))
        return self._gauges[replica, series]

    def _metric(self, family: Family, value: str, **more: str) -> Any:
        """value: of the family's label, if it has one."""
        own = {family.label: value} if family.label else {}
        metric = _metric(self._families[family.name], family, {**self._labels, **own, **more})
        _keep_for_ever(metric)
        return metric


def _keep_for_ever(metric: Any) -> None:
    """One reference too many: the object outlives the interpreter. The end of a metric is told to the server, which at
    a stub's exit follows a pointer to a channel that is gone (a segfault in every clean stop of Triton Server 2.51);
    told earlier, while the model is finalized, it damages the stub's memory, and the server waits for it until its exit
    timeout (4 stops of 6).
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(metric))


def _create(family: Family) -> Any:
    kinds = {
        Kind.COUNTER: pb_utils.MetricFamily.COUNTER,
        Kind.GAUGE: pb_utils.MetricFamily.GAUGE,
        Kind.HISTOGRAM: pb_utils.MetricFamily.HISTOGRAM,
    }
    return pb_utils.MetricFamily(name=family.name, description=family.description, kind=kinds[family.kind])


def _metric(created: Any, family: Family, labels: dict[str, str]) -> Any:
    return (
        created.Metric(labels=labels, buckets=list(family.buckets))
        if family.kind is Kind.HISTOGRAM
        else created.Metric(labels=labels)
    )


def _log_to_stderr(model_name: str) -> None:
    """Beside the engine's lines. The library's own Logger waits for the server with the interpreter's lock held."""
    stderr = logging.StreamHandler()
    stderr.setFormatter(LogLines(model_name))
    log = logging.getLogger("paged")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers = [stderr]
