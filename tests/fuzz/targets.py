"""What any bytes at all may do to the rooms that take them: each target raises if they did something that no bytes may.

A target takes bytes and returns nothing. `RequestError` is how wrong input ends, and is checked; everything else that
is raised is a bug.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from paged_backend.batch import Batch, NewRow, features_of
from paged_backend.engine.checked_runner import CheckedRunner, TableBounds
from paged_backend.engine.engine import Engine
from paged_backend.errors import ErrorKind, RequestError
from paged_backend.frontend.chat_template import ChatTemplate
from paged_backend.frontend.detokenizer import AnswerText, Detokenizer
from paged_backend.frontend.request_reader import read_request, wants_error_code
from paged_backend.frontend.template_process import render_here
from paged_backend.messages import ExportedTemplate, Submit, decode_to_engine, encode
from paged_backend.models.step import StepShape
from paged_backend.request import Chat, SamplingParams
from paged_backend.runner.step_plan import plan_step
from paged_backend.runner.step_tensors import DeviceRows
from paged_backend.scheduler.limits import SchedulerLimits
from paged_backend.scheduler.scheduler import Scheduler
from tests.simulated_runner import SimulatedRunner, solo
from tests.small_tokenizers import byte_fallback, byte_level

_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>{% endfor %}{% if "
    "tools %}{{ tools | tojson }}{% endif %}"
)
_SPECIAL = ["<|im_start|>", "<|im_end|>"]
_LONGEST_MESSAGE = 2000
_KINDS: dict[str, type] = {"i": np.int32, "f": np.float32, "b": np.bool_, "u": np.uint64}
_NAMES = (
    "text_input input_ids messages sampling_parameters stream max_tokens temperature top_p seed stop_words "
    "bad_words tools"
)
_TENSORS = _NAMES.split()


def _refused(error: RequestError) -> None:
    assert error.kind in (ErrorKind.INVALID, ErrorKind.UNSUPPORTED), error
    assert 0 < len(str(error)) < _LONGEST_MESSAGE, len(str(error))


def request(content: bytes) -> None:
    """Tensors of any type and shape, and parameters: lines of `name type numbers or text`."""
    tensors: dict[str, Any] = {}
    parameters, *lines = content.split(b"\n")
    for line in lines:
        name, _, rest = line.partition(b" ")
        kind, _, value = rest.partition(b" ")
        array: np.ndarray
        if kind.decode("latin-1") in _KINDS:
            numbers = np.frombuffer(value[: len(value) // 8 * 8], np.uint64)
            with np.errstate(all="ignore"):
                array = numbers.astype(_KINDS[kind.decode()])
        else:
            array = np.array([*value.split(b"\0")], np.object_)
            array = array.reshape(1, -1) if kind == b"2" else array
        tensors[_TENSORS[name[0] % len(_TENSORS)] if name else "text_input"] = array
    text = parameters.decode(errors="surrogateescape")
    wants_error_code(text)
    try:
        made = read_request(tensors, text, 0.0)
    except RequestError as error:
        _refused(error)
        return
    assert (made.text is not None) + (made.input_ids is not None) + (made.chat is not None) == 1
    _usable(made.sampling)


def sampling(content: bytes) -> None:
    """sampling_parameters."""
    tensors: dict[str, Any] = {
        "text_input": np.array([b"a"], np.object_),
        "sampling_parameters": np.array([content], np.object_),
    }
    try:
        made = read_request(tensors, "", 0.0)
    except RequestError as error:
        _refused(error)
        return
    _usable(made.sampling)


def _usable(params: SamplingParams) -> None:
    """What was accepted can be sent to the engine and sampled with."""
    submit = Submit(1, b"\0\0\0\0", params, (), "", 0.0)
    if params.seed is None or -(2**63) <= params.seed < 2**64:
        assert decode_to_engine(encode(submit)) == submit
    features_of(params, (), ())
    numbers = (
        params.temperature,
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
    )
    assert np.isfinite(np.array(numbers, np.float32)).all()


def chat(content: bytes) -> None:
    """messages and tools, between which there is a zero byte."""
    messages, _, tools = content.decode(errors="replace").partition("\0")
    template = ChatTemplate(
        ExportedTemplate({"default": _TEMPLATE}, {"eos_token": "<|im_end|>"}), _SPECIAL, render_here, 2**22
    )
    try:
        parts = template.render(Chat(messages=messages, tools=tools or None))
    except RequestError as error:
        _refused(error)
        return
    written = " ".join(parts[::2])
    assert written.count("<|im_start|>") == written.count("<|im_end|>") == len(json.loads(messages)), (
        "a caller's words became special tokens"
    )
    assert all(part in _SPECIAL for part in parts[1::2])


@cache
def _tokenizers() -> tuple[Tokenizer, Tokenizer, list[int]]:
    level = byte_level()
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}
    return level, byte_fallback(), [level.token_to_id(alphabet[byte]) for byte in range(256)]


def detokenizer(content: bytes) -> None:
    """Any bytes as tokens of one byte; then any tokens with stop strings, in any pieces."""
    level, fallback, of_byte = _tokenizers()
    context = level.encode("the").ids
    ids = [of_byte[byte] for byte in content]
    stepper = Detokenizer(level, context, True)
    text = "".join([*(stepper.step(token_id) for token_id in ids), stepper.flush()])
    whole = level.decode([*context, *ids], skip_special_tokens=True)
    assert text == whole[len("the") :], (text, whole)
    params = SamplingParams(stop=("the", "a\ufffd", "é"), include_stop_str_in_output=bool(len(content) % 2))
    for tokenizer in (level, fallback):
        _pieces(tokenizer, [byte + 3 for byte in content], params, [*content] or [1])


def _pieces(tokenizer: Tokenizer, ids: list[int], params: SamplingParams, sizes: list[int]) -> None:
    """However an answer is cut into pieces, its text is the same, and ends at the same stop string."""

    def text_of(cuts: list[int]) -> tuple[str, int]:
        answer, text, count, at = AnswerText(tokenizer, [5, 6], params), "", 0, 0
        for size in cuts:
            piece = ids[at : at + size]
            at += size
            passage = answer.add(piece, "length" if at >= len(ids) else None)
            text += passage.text
            count += passage.num_tokens
            if passage.stopped or at >= len(ids):
                break
        return text, count

    if ids:
        cuts = [1 + size % 4 for size in sizes] * len(ids)
        assert text_of(cuts) == text_of([1] * len(ids))


def page_tables(content: bytes) -> None:
    """Batches packed for the device, and read back: every token has the position, the id and the slot that its row's
    table says.
    """
    rows, size, length = 4, 4, 32
    device = DeviceRows(rows, length, size, 1, torch.device("cpu"))
    tables: dict[int, list[int]] = {}
    tokens: dict[int, list[int]] = {}
    lengths: dict[int, int] = {}
    numbers = iter(content)

    def number(end: int) -> int:
        return next(numbers, 0) % end

    for step in range(1, 2 + len(content) // 8):
        chosen = [row for row in range(rows) if number(2)] or [0]
        new, updates, starts, counts = [], [], [], []
        for row in chosen:
            if row not in tokens or number(4) == 0 or lengths[row] >= length - 1:
                tokens[row] = [number(90) for _ in range(1 + number(length - 2))]
                tables[row], lengths[row] = [], 0
                new.append(
                    NewRow(row, np.array(tokens[row], np.int32), len(tokens[row]), SamplingParams(), number(9), (), ())
                )
            start = lengths[row]
            count = 1 + number(max(1, len(tokens[row]) - start))
            while len(tables[row]) * size < start + count:
                tables[row].append(number(64))
                updates.append((row, len(tables[row]) - 1, tables[row][-1]))
            lengths[row] = start + count
            starts.append(start)
            counts.append(count)
        as_array = [np.array(column, np.int32) for column in (chosen, starts, counts)]
        samples = np.array([lengths[row] == len(tokens[row]) for row in chosen])
        changes = np.array(updates, np.int32).reshape(-1, 3)
        batch = Batch(step, *as_array, samples, as_array[0].astype(np.int64), tuple(new), changes)
        num_decodes = int((as_array[2] == 1).sum()) + number(3)
        num_prefills = len(chosen) - int((as_array[2] == 1).sum()) + number(2)
        prefill_tokens = int(as_array[2][as_array[2] > 1].sum()) + (number(5) if num_prefills else 0)
        made = device.apply(batch, plan_step(batch, StepShape(num_decodes, num_prefills, prefill_tokens)))
        _compare(made, batch, tables, tokens, size)
        for row in chosen:  # as if the step had sampled
            if lengths[row] == len(tokens[row]):
                tokens[row].append(7)
                device.token_ids[row, lengths[row]] = 7


def _compare(made: Any, batch: Batch, tables: dict[int, list[int]], tokens: dict[int, list[int]], size: int) -> None:
    planned = made.plan["rows"].tolist()
    starts, query_starts = made.plan["starts"].tolist(), made.query_starts.tolist()
    for row, start, count in zip(batch.rows.tolist(), batch.starts.tolist(), batch.counts.tolist(), strict=True):
        at = planned.index(row)
        assert starts[at] == start and made.seq_lens[at] == start + count
        span = slice(query_starts[at], query_starts[at] + count)
        positions = list(range(start, start + count))
        assert made.positions[span].tolist() == positions
        assert made.input_ids[span].tolist() == [tokens[row][position] for position in positions]
        assert made.groups[0].slot_mapping[span].tolist() == [
            tables[row][position // size] * size + position % size for position in positions
        ]
        num_pages = -(-(start + count) // size)
        assert made.groups[0].page_table[at, :num_pages].tolist() == tables[row][:num_pages]
    assert int((made.groups[0].slot_mapping >= 0).sum()) == batch.num_tokens, "padding has slots"


def scheduling(content: bytes) -> None:
    """Requests, steps and aborts in any order, in a pool that the first bytes make small; `check` and debug_checks
    after and before every step.
    """
    setup = struct.unpack("6B", content[:6].ljust(6, b"\1"))
    limits = _small_limits(setup)
    rows, max_len = limits.max_num_sequences, limits.max_model_len
    sizes = rows, limits.num_pages, limits.page_size, max_len, limits.max_batched_tokens
    scheduler = Scheduler(limits, clock=lambda: 0.0)
    runner = SimulatedRunner(*sizes)
    engine = Engine(scheduler, CheckedRunner(runner, TableBounds(*sizes), scheduler.check), setup[5] >> 2 & 1)
    expected: dict[int, list[int]] = {}
    answers: dict[int, list[int]] = {}

    def step() -> None:
        for output in engine.step():
            for request_id, token in zip(output.request_ids.tolist(), output.token_ids.tolist(), strict=True):
                answers[request_id].append(token)
            for finish in output.finishes:
                assert finish.error is not None or answers[finish.request_id] == expected[finish.request_id]
                expected.pop(finish.request_id)
        engine.check()

    for serial, byte in enumerate(content[6:]):
        if byte < 100:
            prompt, count = [6 + (byte + index) % 3 for index in range(1 + byte % max_len)], 1 + byte % 7
            answers[serial] = []
            expected[serial] = solo(prompt, min(count, max_len - len(prompt)), (), runner.vocab_size)
            params = SamplingParams(max_tokens=count, temperature=0.0, priority_level=byte % 2, ignore_eos=True)
            engine.submit(
                Submit(
                    serial,
                    np.array(prompt, np.int32).tobytes(),
                    params,
                    (),
                    "ab"[byte & 1],
                    0.0,
                    suspect=byte % 11 == 0,
                )
            )
        elif byte < 130 and expected:
            gone = sorted(expected)[byte % len(expected)]
            engine.abort(gone)
            del expected[gone]
            answers[gone] = []
        else:
            step()
    for _ in range(3000):
        if engine.idle:
            break
        step()
    assert engine.idle and not expected and scheduler.pool.num_available == limits.num_pages


def _small_limits(setup: Sequence[int]) -> SchedulerLimits:
    page_size, spare, max_len, rows, budget = (
        1 << setup[0] % 4,
        setup[1] % 8,
        2 + setup[2] % 30,
        1 + setup[3] % 5,
        1 + setup[4] % 40,
    )
    return SchedulerLimits(
        page_size,
        -(-max_len // page_size) + spare,
        max_len,
        rows,
        budget,
        max_queue_size=6,
        prefix_cache=bool(setup[5] & 1),
        preemption=bool(setup[5] & 2),
    )


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (request, sampling, chat, detokenizer, page_tables, scheduling)
}
