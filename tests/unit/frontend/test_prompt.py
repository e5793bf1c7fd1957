"""From a caller's text to token ids, within limits that are stated with numbers."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer

from paged_backend.config import EngineConfig
from paged_backend.errors import EngineError, ErrorKind, RequestError
from paged_backend.frontend.prompt import PromptReader, load_tokenizer
from paged_backend.frontend.tasks import describe
from paged_backend.messages import Prompt, Ready
from paged_backend.request import Outputs, Request, SamplingParams
from tests.small_tokenizers import byte_fallback, byte_level


@pytest.fixture(params=[byte_level, byte_fallback], ids=["byte-level", "byte-fallback"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.param()


def _reader(
    tokenizer: Tokenizer | None, tmp_path: Path, max_model_len: int = 64, max_pool_tokens: int = 1024, **options: object
) -> PromptReader:
    path = None
    if tokenizer is not None:
        path = str(tmp_path / "tokenizer.json")
        tokenizer.save(path)
    vocab_size = 1000 if tokenizer is None else tokenizer.get_vocab_size()
    ready = Ready(path, vocab_size, max_model_len, max_pool_tokens, 16, max_pool_tokens // 16)
    return PromptReader(EngineConfig.parse(options), ready)


def _read(
    reader: PromptReader, text: str | None = None, ids: tuple[int, ...] | None = None, **sampling: object
) -> Prompt:
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    return reader.read(_request(text, None if ids is None else np.array(ids, np.int64), params))


def _request(text: str | None, input_ids: np.ndarray | None, sampling: SamplingParams) -> Request:
    return Request(
        text=text,
        input_ids=input_ids,
        sampling=sampling,
        outputs=Outputs(),
        stream=True,
        prepend_prompt=False,
        arrival=0.0,
    )


def test_text_is_tokenised_with_the_models_special_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    prompt = _read(_reader(tokenizer, tmp_path), "the question")
    assert prompt.token_ids.tolist() == tokenizer.encode("the question", add_special_tokens=True).ids
    assert prompt.token_ids.dtype == "int32"


def test_token_ids_are_taken_as_they_are(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert _read(_reader(tokenizer, tmp_path), ids=(5, 6, 7)).token_ids.tolist() == [5, 6, 7]


def test_a_model_without_a_tokenizer_takes_token_ids_only(tmp_path: Path) -> None:
    reader = _reader(None, tmp_path)
    assert _read(reader, ids=(5,)).token_ids.tolist() == [5]
    for kind, call in {
        "text_input": lambda: _read(reader, "text"),
        "stop": lambda: _read(reader, ids=(5,), stop=("x",)),
        "bad_words": lambda: _read(reader, ids=(5,), bad_words=("x",)),
    }.items():
        with pytest.raises(RequestError, match=f"{kind}: this model has no tokenizer"):
            call()


@pytest.mark.parametrize("bad", [-1, 10**6, 2**31 - 1])
def test_an_unknown_token_id_is_named(tokenizer: Tokenizer, tmp_path: Path, bad: int) -> None:
    with pytest.raises(
        RequestError,
        match=f"input_ids: {bad} is not a token of this model; its ids are 0 to {tokenizer.get_vocab_size() - 1}",
    ):
        _read(_reader(tokenizer, tmp_path), ids=(5, bad))


def test_a_bias_of_an_unknown_token_is_refused(tmp_path: Path) -> None:
    reader = _reader(None, tmp_path)
    assert _read(reader, ids=(1,), logit_bias={999: 1.0}).sampling.logit_bias == {999: 1.0}
    with pytest.raises(RequestError, match="logit_bias: 1000 is not a token of this model; its ids are 0 to 999"):
        _read(reader, ids=(1,), logit_bias={5: 1.0, 1000: 1.0})


def test_routers_are_told_pages_of_tokens_even_where_a_page_is_of_one_kv_group() -> None:
    reader = PromptReader(
        EngineConfig.parse({}), Ready(None, 1000, 64, max_pool_tokens=1024, page_size=16, num_pages=3 * 64 + 1)
    )
    assert describe(reader, EngineConfig.parse({}))["num_pages"] == 64


def _reader_with_added_tokens(tokenizer: Tokenizer, tmp_path: Path) -> PromptReader:
    """Its tokenizer knows two tokens more than the model has embeddings."""
    vocab_size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.add_tokens(["<added>"])
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return PromptReader(EngineConfig.parse({}), Ready(str(path), vocab_size, 64, 1024, 16, 64))


@pytest.mark.parametrize(("token", "offset"), [("<pad>", 0), ("<added>", 1)])
def test_a_token_of_the_text_that_the_model_has_no_embedding_of_is_named(
    tokenizer: Tokenizer, tmp_path: Path, token: str, offset: int
) -> None:
    last = tokenizer.get_vocab_size() - 1
    reader = _reader_with_added_tokens(tokenizer, tmp_path)
    named = (
        rf"text_input: the text has the token '{token}' \(id {last + 1 + offset}\), which .*; its ids are 0 to {last}"
    )
    with pytest.raises(RequestError, match=named):
        _read(reader, f"the {token} answer")
    assert len(_read(reader, "the answer").token_ids)


def test_parts_of_a_chat_are_bounded_by_the_vocabulary_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    reader = _reader_with_added_tokens(tokenizer, tmp_path)
    with pytest.raises(RequestError, match="messages: the text has the token '<added>'"):
        reader._ids_of_parts(["the <added> answer", "<pad>", "to"], False)


def test_the_tokens_without_an_embedding_are_known_at_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    vocab_size = tokenizer.get_vocab_size()
    assert _reader_with_added_tokens(tokenizer, tmp_path).unknown_tokens() == {
        "<pad>": vocab_size,
        "<added>": vocab_size + 1,
    }
    assert _reader(byte_level(), tmp_path).unknown_tokens() == {}
    assert _reader(None, tmp_path).unknown_tokens() == {}


def test_a_bad_word_of_a_token_that_is_never_chosen_bans_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    reader = _reader_with_added_tokens(tokenizer, tmp_path)
    assert all(
        max(word) <= tokenizer.get_vocab_size() - 3
        for word in _read(reader, "the", bad_words=("<added>", "a")).bad_words
    )


def test_a_stop_id_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    reader = _reader(None, tmp_path)
    assert _read(reader, ids=(1,), stop_token_ids=(999,)).sampling.stop_token_ids == (999,)
    with pytest.raises(RequestError, match="stop_token_ids: 1000 is not a token of this model; its ids are 0 to 999"):
        _read(reader, ids=(1,), stop_token_ids=(5, 1000))


def test_an_empty_prompt_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    reader = _reader(tokenizer, tmp_path)
    with pytest.raises(RequestError, match="text_input: the prompt is empty"):
        _read(reader, "")
    with pytest.raises(RequestError, match="input_ids: the prompt is empty"):
        _read(reader, ids=())


def test_a_prompt_of_too_many_bytes_is_refused_before_it_is_tokenised(tokenizer: Tokenizer, tmp_path: Path) -> None:
    reader = _reader(tokenizer, tmp_path, max_prompt_bytes=1000)
    assert reader.tokenizer is not None
    started = time.perf_counter()
    with pytest.raises(RequestError, match="text_input: the prompt has 50000000 bytes; the longest allowed is 1000"):
        _read(reader, "é" * 25_000_000)
    assert time.perf_counter() - started < 1


def test_prompts_up_to_the_limit_leave_room_for_one_token(tmp_path: Path) -> None:
    reader = _reader(None, tmp_path, max_model_len=10)
    prompt = _read(reader, ids=(1,) * 9, max_tokens=5, min_tokens=3)
    assert (prompt.sampling.max_tokens, prompt.sampling.min_tokens) == (1, 1)
    with pytest.raises(RequestError, match="the prompt has 10 tokens; the longest this model takes is 9"):
        _read(reader, ids=(1,) * 10)


@pytest.mark.parametrize(("truncate", "kept"), [(1, 1), (63, 63), (64, 63), (-1, 63), (10**6, 63)])
def test_a_prompt_is_cut_to_its_last_tokens_if_the_caller_says_so(tmp_path: Path, truncate: int, kept: int) -> None:
    reader, ids = _reader(None, tmp_path, max_model_len=64), tuple(range(200))
    if truncate in (64, 10**6):
        with pytest.raises(RequestError, match=r"the longest this model takes is 63 \(max_model_len"):
            _read(reader, ids=ids, truncate_prompt_tokens=truncate)
    else:
        assert _read(reader, ids=ids, truncate_prompt_tokens=truncate).token_ids.tolist() == list(
            range(200 - kept, 200)
        )


def test_a_prompt_shorter_than_the_cut_stays_whole(tmp_path: Path) -> None:
    assert _read(_reader(None, tmp_path), ids=(5, 6), truncate_prompt_tokens=3).token_ids.tolist() == [5, 6]


def test_a_prompt_larger_than_the_pool_is_refused_with_the_numbers(tmp_path: Path) -> None:
    reader = _reader(None, tmp_path, max_model_len=1000, max_pool_tokens=32)
    with pytest.raises(RequestError, match=r"the prompt has 33 tokens; the page pool holds 32 \(2 pages of 16\)"):
        _read(reader, ids=(1,) * 33)


@pytest.mark.parametrize(
    ("answer_ids", "message"),
    [
        ([5, 6, 7], "answer_ids: 3 tokens are all that the answer may have: max_tokens is 3"),
        ([10**6], "answer_ids: 1000000 is not a token of this model"),
    ],
    ids=["nothing is left to say", "no token"],
)
def test_an_answer_that_cannot_go_on_is_refused(tmp_path: Path, answer_ids: list[int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        _continued(_reader(byte_level(), tmp_path), answer_ids)


def test_an_answers_first_tokens_are_no_part_of_the_prompt(tmp_path: Path) -> None:
    prompt = _continued(_reader(byte_level(), tmp_path), [5, 6])
    assert prompt.answer_ids is not None
    assert (prompt.token_ids.tolist(), prompt.answer_ids.tolist(), prompt.sampling.max_tokens) == ([3, 4], [5, 6], 3)


def _continued(reader: PromptReader, answer_ids: list[int]) -> Prompt:
    asked = {
        "text": None,
        "sampling": SamplingParams(max_tokens=3),
        "outputs": Outputs(),
        "stream": True,
        "prepend_prompt": False,
        "arrival": 0.0,
    }
    return reader.read(Request(input_ids=np.array([3, 4]), answer_ids=np.array(answer_ids), **asked))  # type: ignore[arg-type]


def test_max_tokens_has_a_default_and_a_limit(tmp_path: Path) -> None:
    reader = _reader(None, tmp_path, max_model_len=64, default_max_tokens=7)
    assert _read(reader, ids=(1,)).sampling.max_tokens == 7
    assert _read(reader, ids=(1,), max_tokens=64).sampling.max_tokens == 63
    with pytest.raises(
        RequestError, match=r"max_tokens: 65 is more than this model's longest sequence \(max_model_len 64\)"
    ):
        _read(reader, ids=(1,), max_tokens=65)


def test_a_default_longer_than_the_model_is_no_error(tmp_path: Path) -> None:
    assert (
        _read(_reader(None, tmp_path, max_model_len=64, default_max_tokens=500), ids=(1, 2)).sampling.max_tokens == 62
    )


def test_bad_words_are_banned_with_and_without_a_space_before_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    banned = _read(_reader(tokenizer, tmp_path), "the", bad_words=("a",)).bad_words
    spellings = {tuple(tokenizer.encode(text, add_special_tokens=False).ids) for text in ("a", " a")}
    assert set(banned) == spellings
    assert len(banned) == len(spellings) == 2


def test_a_bad_word_of_too_many_tokens_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"bad_words: 'z{30}' has \d+ tokens; the longest allowed is 16"):
        _read(_reader(tokenizer, tmp_path), "the", bad_words=("z" * 30,))


def test_a_text_that_the_tokenizer_cannot_spell_is_the_callers_error(tmp_path: Path) -> None:
    from tokenizers import models

    reader = _reader(Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]")), tmp_path)
    with pytest.raises(RequestError, match="cannot be tokenised") as caught:
        _read(reader, "b")
    assert caught.value.kind is ErrorKind.INVALID


def test_a_broken_tokenizer_file_is_an_operators_error(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(EngineError, match="cannot be read"):
        load_tokenizer(path)


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    assert len(_read(_reader(tokenizer, tmp_path), "zzzzz").token_ids) == 5


def test_tokenisation_does_not_stop_other_threads(tmp_path: Path) -> None:
    reader = _reader(byte_level(), tmp_path, max_model_len=10_000_000, max_pool_tokens=10_000_000)
    done = threading.Event()

    def read() -> None:
        _read(reader, "some long text " * 100_000)
        done.set()

    reader.later(read)
    num_turns = 0
    while not done.is_set():
        time.sleep(0.001)
        num_turns += 1
    reader.close()
    # a second or more of tokenisation that kept the interpreter to itself would leave two or three
    assert num_turns > 20


@pytest.mark.parametrize(
    ("text", "ids", "num_answered", "bad_words", "at_once"),
    [
        ("the", None, 0, (), True),
        ("x" * 2048, None, 0, (), True),
        ("x" * 2049, None, 0, (), False),
        (None, 2048, 0, (), True),
        (None, 2049, 0, (), False),
        ("the", None, 2045, (), True),
        ("the", None, 2046, (), False),
        ("the", None, 0, ("question",), False),
    ],
    ids=[
        "short",
        "longest",
        "too long",
        "most ids",
        "too many ids",
        "the longest answer so far",
        "too long an answer so far",
        "bad words",
    ],
)
def test_short_prompts_are_read_at_once_and_long_ones_on_a_thread(
    tmp_path: Path, text: str | None, ids: int | None, num_answered: int, bad_words: tuple[str, ...], at_once: bool
) -> None:
    reader = _reader(byte_level(), tmp_path)
    threads: list[str] = []
    input_ids = None if ids is None else np.full(ids, 5, np.int64)
    request = _request(text, input_ids, SamplingParams(bad_words=bad_words))
    if num_answered:
        request = msgspec.structs.replace(request, answer_ids=np.full(num_answered, 5, np.int64))
    reader.soon(lambda: threads.append(threading.current_thread().name), request)
    assert (threads == [threading.current_thread().name]) == at_once
    reader.close()
    assert len(threads) == 1


def test_a_short_prompt_waits_behind_those_that_wait(tmp_path: Path) -> None:
    reader = _reader(byte_level(), tmp_path)
    go_on, begun = threading.Event(), []
    for number in range(3):  # two threads, and one waits
        reader.later(lambda number=number: (begun.append(number), go_on.wait(20)))
    reader.soon(lambda: begun.append("short"), _request("the", None, SamplingParams()))
    assert "short" not in begun
    go_on.set()
    deadline = time.monotonic() + 20
    while len(begun) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    reader.close()
    assert begun.index("short") > begun.index(1)


def test_the_prompts_text_can_be_had_from_its_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    reader = _reader(tokenizer, tmp_path)
    ids = np.array(tokenizer.encode("the question").ids)
    request = Request(
        text=None,
        input_ids=ids,
        sampling=SamplingParams(),
        outputs=Outputs(),
        stream=False,
        prepend_prompt=True,
        arrival=0.0,
    )
    assert reader.text_of(request) == "the question"


def test_a_stop_string_that_is_a_special_token_is_a_stop_id(tokenizer: Tokenizer, tmp_path: Path) -> None:
    reader = _reader(tokenizer, tmp_path)
    eos = tokenizer.token_to_id("</s>")
    assert _read(reader, "the", stop=("</s>", "x"), stop_token_ids=(5,)).sampling.stop_token_ids == (5, eos)
    assert _read(reader, "the", stop=("</s>",), skip_special_tokens=False).sampling.stop_token_ids == (), (
        "its text is seen"
    )
    assert _read(reader, "the", stop=("x</s>",)).sampling.stop_token_ids == ()


def test_special_tokens_around_a_text_are_left_out_if_the_caller_says_so(tokenizer: Tokenizer, tmp_path: Path) -> None:
    reader = _reader(tokenizer, tmp_path)
    plain = tokenizer.encode("the", add_special_tokens=False).ids
    assert _read(reader, "the", add_special_tokens=False).token_ids.tolist() == plain
    assert _read(reader, "the", add_special_tokens=True).token_ids.tolist() == tokenizer.encode("the").ids
