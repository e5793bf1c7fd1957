"""Grammars and guides through the engine: when a request waits, when it is refused, when it ends, and what is kept."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paged_backend.engine.engine import Engine
from paged_backend.errors import ErrorKind
from paged_backend.grammar import compiler_process as grammar_process
from paged_backend.messages import Submit
from paged_backend.request import parse_sampling
from tests.small_tokenizers import byte_fallback
from tests.structured_engine import (
    EOS,
    PROMPT,
    TOKENIZER,
    CompilerHere,
    Ended,
    drain,
    load_speaker,
    run,
    save_speaker,
    submit,
)

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaker(tmp_path_factory.mktemp("speaker"))


@pytest.fixture
def engine(folder: Path, tmp_path: Path) -> Engine:
    return load_speaker(folder, tmp_path)


def one(engine: Engine, **sampling: Any) -> Ended:
    return run(engine, [sampling])[0]


# ---- refusals


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({"guided_json": "{"}, "guided_json: not valid JSON: "),
        ({"guided_json": "[" * 50_000}, "guided_json: "),
        ({"guided_json": "3"}, "guided_json: Schema should be an object or bool, but got 3"),
        ({"guided_json": {"type": "text"}}, 'guided_json: Unsupported type "text"'),
        ({"guided_json": {"not": {}}}, "guided_json: 'not' is not supported"),
        (
            {"structured_outputs": {"json": {"type": "string", "pattern": "("}}},
            "structured_outputs.json: pattern: a '(' without its ')' at position 1",
        ),
        ({"guided_regex": "(?=a)b"}, "guided_regex: Regex parsing error at position 3: Lookahead is not supported"),
        ({"guided_regex": "\\p{L}"}, "guided_regex: Regex parsing error"),
        (
            {"guided_grammar": "root ::= foo"},
            'guided_grammar: EBNF parser error at line 1, column 10: Rule "foo" is not defined',
        ),
        ({"guided_grammar": "start: foo"}, "guided_grammar: "),
        ({"guided_grammar": "start: A\nA: (b)"}, "guided_grammar: Lark error at line 2"),
        (
            {"guided_grammar": 'start: A\nA: "a" | /b(?=c)d/'},
            "guided_grammar: Lark error at line 2, column 10: failed to compile regular expression: Regex "
            "parsing error at position 4: Lookahead",
        ),
        ({"guided_grammar": "root ::= root"}, "guided_grammar: it allows no token of this model"),
        ({"guided_json": {"enum": ["\t"]}}, "stop"),  # escaped: no control character comes
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason_and_the_key(
    engine: Engine, sampling: dict[str, Any], reason: str
) -> None:
    ended = one(engine, **sampling)
    assert ended.finish is not None and ended.reason.startswith(reason)
    assert "/" not in ended.reason.replace("/b(?=c)d/", "") and len(ended.reason) < 500
    if reason != "stop":
        assert ended.finish.error is ErrorKind.INVALID and not ended.token_ids


def test_without_the_extra_the_answer_says_how_to_install_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    engine = load_speaker(folder, tmp_path)
    guided, free = run(engine, [{"guided_regex": "a"}, {"max_tokens": 3}])
    assert guided.finish is not None and guided.finish.error is ErrorKind.UNSUPPORTED
    assert guided.reason.startswith(
        "guided_regex: structured output needs the package xgrammar, which is not installed in this server"
    )
    assert free.reason == "length"


def test_a_model_without_a_tokenizer_has_no_grammars(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    assert one(load_speaker(bare, tmp_path), guided_regex="a").reason == "guided_regex: this model has no tokenizer"


def test_a_failure_that_is_not_the_grammars_ends_the_request_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_process, "_checked_schema", lambda text: 1 // 0)
    guided, free = run(engine, [{"guided_json": "{}"}, {"max_tokens": 3}])
    assert guided.reason == "guided_json: it cannot be compiled"
    assert guided.finish is not None and guided.finish.error is ErrorKind.INTERNAL
    assert free.reason == "length"


def test_bad_words_that_leave_nothing_end_the_request_with_both_names(engine: Engine) -> None:
    ended = one(engine, guided_regex="(aa)+", bad_words=["a"])
    assert ended.reason == "guided_regex: no token was left that it and bad_words allow"


def test_a_token_that_the_model_does_not_have_cannot_come(tmp_path: Path) -> None:
    tokenizer = byte_fallback()
    engine = load_speaker(save_speaker(tmp_path / "speaker", tokenizer), tmp_path / "exports")
    assert one(engine, guided_choice=["日本 the"]).finish.reason == "stop"  # type: ignore[union-attr]
    assert one(engine, guided_regex="x").reason == "stop"  # a byte piece


# ---- waiting


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Compilations wait until it is set."""
    event, compile_now = threading.Event(), CompilerHere.compile
    monkeypatch.setattr(CompilerHere, "compile", lambda *arguments: (event.wait(), compile_now(*arguments))[1])
    yield event
    event.set()


def test_who_waits_for_a_grammar_holds_up_nobody(engine: Engine, gate: threading.Event) -> None:
    submit(engine, 0, {"guided_regex": "[0-9]{5}"})
    submit(engine, 1, {"max_tokens": 6})
    finished = [finish for _ in range(20) for output in engine.step() for finish in output.finishes]
    assert [finish.request_id for finish in finished] == [1]
    assert engine.stalled and not engine.idle
    assert engine.stats().num_waiting == 1
    engine.check()
    gate.set()
    ended = drain(engine, 1)[0]
    assert ended.text.isdigit() and len(ended.text) == 5


def test_who_leaves_while_his_grammar_is_compiled_is_forgotten(engine: Engine, gate: threading.Event) -> None:
    submit(engine, 0, {"guided_regex": "a"})
    engine.step()
    engine.abort(0)
    assert engine.idle
    engine.check()
    gate.set()
    assert one(engine, guided_regex="a").text == "a"


def test_a_request_overdue_by_its_grammar_is_told_so(folder: Path, tmp_path: Path, gate: threading.Event) -> None:
    engine = load_speaker(folder, tmp_path, max_waiting_seconds=0.1)
    sampling = parse_sampling({"guided_regex": "a"})
    engine.submit(Submit(0, np.array(PROMPT, np.int32).tobytes(), sampling, (), "", time.monotonic() - 10))
    assert "max_waiting_seconds" in drain(engine, 1)[0].reason


# ---- its end


@pytest.mark.parametrize("options", [{"ignore_eos": True}, {}], ids=["ignore_eos", "no eos"])
def test_without_stop_tokens_an_answer_ends_when_it_is_complete(
    folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    if not options:
        folder = save_speaker(tmp_path / "speaker", eos_token_id=None)
    engine = load_speaker(folder, tmp_path / "exports")
    samplings = [
        {"guided_choice": ["yes", "no"]},
        {"guided_json": SCHEMA},
        {"guided_regex": "a*"},
        {"guided_regex": "[0-9]+", "min_tokens": 7},
    ]
    choice, schema, stars, digits = run(engine, [sampling | options for sampling in samplings])
    assert {ended.reason for ended in (choice, schema, stars, digits)} == {"stop"}
    assert choice.text in ("yes", "no") and json.loads(schema.text).keys() == {"name", "age"}
    assert stars.text == "a"  # an answer has a token
    assert digits.text.isdigit() and len(digits.token_ids) == 7


def test_an_end_token_comes_only_after_a_complete_answer_and_nothing_else_does(engine: Engine) -> None:
    for ended in run(
        engine, [{"guided_choice": ["yes", "no", "now"], "logit_bias": {str(EOS): 100.0}, "temperature": 2.0}] * 8
    ):
        assert ended.token_ids[-1] == EOS and ended.reason == "stop"
        assert ended.text in ("yes", "no", "now")


def test_min_tokens_holds_where_the_grammar_can_go_on_and_yields_where_it_cannot(engine: Engine) -> None:
    more, full = run(
        engine,
        [
            {"guided_regex": "[0-9]*", "min_tokens": 9, "logit_bias": {str(EOS): 100.0}},
            {"guided_choice": ["yes"], "min_tokens": 9},
        ],
    )
    assert len(more.token_ids) == 10 and more.reason == "stop"
    assert full.text == "yes" and full.reason == "stop"


def test_stop_token_ids_end_the_answer_and_may_follow_it(engine: Engine) -> None:
    brace, word = TOKENIZER.token_to_id("}"), TOKENIZER.token_to_id("Z")
    inside = one(engine, guided_regex="a}b", stop_token_ids=[brace])
    assert [inside.text, inside.reason] == ["a}", "stop"]
    after = one(engine, guided_regex="ab", stop_token_ids=[word], ignore_eos=True)
    assert [after.text, after.reason] == ["abZ", "stop"]
    waits = one(
        engine,
        guided_regex="a[}c]b",
        stop_token_ids=[brace],
        min_tokens=3,
        temperature=0.0,
        logit_bias={str(brace): 100.0},
    )
    assert waits.text == "acb}"  # not in the second place, and then as the end


def test_an_answer_begun_by_another_engine_goes_on_where_it_was(engine: Engine) -> None:
    whole = one(engine, guided_json=SCHEMA)
    for cut in (1, len(whole.token_ids) // 2, len(whole.token_ids) - 1):
        submit(engine, 0, {"guided_json": SCHEMA}, answer=whole.token_ids[:cut])
        rest = drain(engine, 1)[0]
        assert whole.token_ids[:cut] + rest.token_ids == whole.token_ids
    submit(engine, 0, {"guided_choice": ["yes"], "ignore_eos": True}, answer=TOKENIZER.encode("yes").ids)
    over = drain(engine, 1)[0]
    assert over.token_ids == [] and over.reason == "stop"


# ---- rows


def test_an_unguided_sequence_on_the_row_of_a_guided_one_may_say_anything(folder: Path, tmp_path: Path) -> None:
    engine = load_speaker(folder, tmp_path, max_num_sequences=1)
    free = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
    before = one(engine, **free)
    assert one(engine, guided_regex="[ab]{12}").reason == "stop"
    assert one(engine, **free).token_ids == before.token_ids


def test_company_with_a_grammar_changes_no_token_of_the_others(engine: Engine) -> None:
    free = [
        {"max_tokens": 30, "ignore_eos": True},
        {"max_tokens": 30, "temperature": 0.0, "ignore_eos": True, "repetition_penalty": 1.3},
    ]
    alone = [ended.token_ids for ended in run(engine, free)]
    company = run(engine, [*free, {"guided_json": SCHEMA}, {"guided_regex": "[a-f]{20}"}])
    assert [ended.token_ids for ended in company[:2]] == alone


def test_others_run_ahead_while_a_guided_row_waits_for_its_token(engine: Engine) -> None:
    engine._steps_ahead = 1
    batches = []
    launch = engine._runner.launch
    engine._runner.launch = lambda batch: (batches.append(batch), launch(batch))[1]  # type: ignore[method-assign]
    free, guided = run(
        engine, [{"max_tokens": 20, "ignore_eos": True, "temperature": 0.0}, {"guided_regex": "[0-9]{6}"}]
    )
    assert guided.text.isdigit() and len(guided.text) == 6
    assert len(free.token_ids) == 20
    assert all(0 in batch.request_ids for batch in batches[:20]), "the free row missed a step"
    assert all([len(ask.rows) for ask in batch.asks] in ([], [1]) for batch in batches)
    assert not any(1 in first.request_ids and 1 in second.request_ids for first, second in pairwise(batches))


def test_the_prompt_is_not_part_of_the_form(engine: Engine) -> None:
    submit(engine, 0, {"guided_regex": "[0-9]"}, prompt=[*PROMPT, *PROMPT])
    assert drain(engine, 1)[0].text.isdigit()


# ---- dead ends, and tokens that arrive late


@pytest.mark.parametrize("ending", [{"stop_token_ids": [0]}, {"max_tokens": 1}], ids=["stop", "length"])
def test_a_token_chosen_because_nothing_was_left_ends_no_answer_well(engine: Engine, ending: dict[str, Any]) -> None:
    """The first of a vocabulary is what is chosen then."""
    ended = one(engine, guided_regex="(aa)+", bad_words=["a"], temperature=0.0, **ending)
    assert ended.token_ids == [0]
    assert ended.reason == "guided_regex: no token was left that it and bad_words allow"


def test_the_last_token_may_land_after_a_preemption(engine: Engine) -> None:
    engine._steps_ahead = 1
    submit(engine, 0, {"guided_regex": "a", "ignore_eos": True})
    scheduler = engine._scheduler
    while not any(batch.samples.any() for batch in (flight.batch for flight in engine._runner._in_flight)):  # type: ignore[attr-defined]
        engine.step()
    scheduler._living.preempt(scheduler._running.runners[0])
    ended = drain(engine, 1)[0]
    assert [ended.text, ended.reason] == ["a", "stop"]


def test_a_grammar_that_becomes_slow_ends_its_sequence_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    submit(engine, 0, {"guided_regex": "[a-z]{50}"})
    submit(engine, 1, {"max_tokens": 20, "ignore_eos": True})
    while engine._scheduler.num_running < 2:
        engine.step()
    monkeypatch.setattr(grammar_process, "_FOLLOW_SECONDS", -9.0)
    guided, free = drain(engine, 2)
    assert guided.reason.startswith("guided_regex: it is too slow to follow: ")
    assert free.reason == "length"
