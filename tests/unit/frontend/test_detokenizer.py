"""Text that is safe to send: exact, whole characters, no half of a stop string."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from paged_backend.frontend.detokenizer import AnswerText, Detokenizer, StopStrings, TokenTexts, stops_of
from paged_backend.request import SamplingParams
from tests.small_tokenizers import byte_fallback, byte_level

BYTE_LEVEL = byte_level()
BYTE_FALLBACK = byte_fallback()
TOKENIZERS = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, BYTE_FALLBACK], ids=["byte-level", "byte-fallback"])
PROMPTS = ["the question", "the ", "日本", "😀", "�", "<s>"]
TEXTS = st.text(alphabet=st.sampled_from("the quesion amwrk<>日本😀é€\u0300\n"), max_size=40) | st.text(max_size=20)


def _bytes_as_tokens(tokenizer: Tokenizer, text: bytes) -> list[int]:
    """One token a byte, whatever the merges say: every split of a character."""
    if tokenizer is BYTE_FALLBACK:
        return [3 + byte for byte in text]
    alphabet = _byte_level_alphabet()
    return [tokenizer.token_to_id(alphabet[byte]) for byte in text]


def _byte_level_alphabet() -> dict[int, str]:
    """GPT-2's map from bytes to printable characters."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def _steps(tokenizer: Tokenizer, prompt_ids: list[int], ids: list[int], skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt_ids, skip)
    return [*(detokenizer.step(token_id) for token_id in ids), detokenizer.flush()]


def _after_prompt(tokenizer: Tokenizer, prompt_ids: list[int], ids: list[int], skip: bool = True) -> str:
    prompt = tokenizer.decode(prompt_ids, skip_special_tokens=skip)
    return tokenizer.decode([*prompt_ids, *ids], skip_special_tokens=skip)[len(prompt) :]


@TOKENIZERS
@given(text=TEXTS, prompt=st.sampled_from(PROMPTS), spelled=st.booleans(), skip=st.booleans())
def test_pieces_of_a_valid_text_add_up_to_the_tokenizers_own_decoding(
    tokenizer: Tokenizer, text: str, prompt: str, spelled: bool, skip: bool
) -> None:
    ids = _bytes_as_tokens(tokenizer, text.encode()) if spelled else tokenizer.encode(text).ids
    prompt_ids = tokenizer.encode(prompt).ids
    assert "".join(_steps(tokenizer, prompt_ids, ids, skip)) == _after_prompt(tokenizer, prompt_ids, ids, skip)


@given(content=st.binary(max_size=200), prompt=st.sampled_from(PROMPTS))
def test_pieces_of_any_bytes_add_up_to_the_tokenizers_own_decoding(content: bytes, prompt: str) -> None:
    ids = _bytes_as_tokens(BYTE_LEVEL, content)
    prompt_ids = BYTE_LEVEL.encode(prompt).ids
    assert "".join(_steps(BYTE_LEVEL, prompt_ids, ids)) == _after_prompt(BYTE_LEVEL, prompt_ids, ids)


@TOKENIZERS
@given(ids=st.lists(st.integers(0, 270), max_size=300))
def test_any_tokens_are_decoded_exactly_unless_a_later_byte_rewrites_what_was_sent(
    tokenizer: Tokenizer, ids: list[int]
) -> None:
    """Byte fallback shows every byte of an invalid run as a replacement character, also those that were a character
    before.
    """
    text = "".join(_steps(tokenizer, [5, 6], ids))
    whole = _after_prompt(tokenizer, [5, 6], ids)
    assert text == whole or (tokenizer is BYTE_FALLBACK and "\ufffd" in whole)


@given(pieces=st.lists(st.tuples(st.binary(max_size=6), st.booleans()), max_size=12), prompt=st.sampled_from(PROMPTS))
def test_streams_that_share_what_tokens_are_spelled_like_have_their_own_text(
    pieces: list[tuple[bytes, bool]], prompt: str
) -> None:
    """Special tokens skipped in one and shown in the other, tokens looked up and not in any order."""
    prompt_ids, texts = BYTE_LEVEL.encode(prompt).ids, TokenTexts(BYTE_LEVEL)
    streams = {skip: Detokenizer(BYTE_LEVEL, prompt_ids, skip, texts) for skip in (False, True)}
    ids, sent = [], {False: "", True: ""}
    end = BYTE_LEVEL.token_to_id("</s>")
    for content, special in pieces:
        ids += [*_bytes_as_tokens(BYTE_LEVEL, content), *BYTE_LEVEL.encode("the quesé").ids, *[end] * special]
    for skip, stream in streams.items():
        sent[skip] = "".join(stream.step(token_id) for token_id in ids) + stream.flush()
        assert sent[skip] == _after_prompt(BYTE_LEVEL, prompt_ids, ids, skip)


def test_only_whole_characters_of_byte_level_tokens_are_looked_up() -> None:
    whole, half = BYTE_LEVEL.encode("the").ids[0], _bytes_as_tokens(BYTE_LEVEL, "é".encode())[0]
    end = BYTE_LEVEL.token_to_id("</s>")
    texts = TokenTexts(BYTE_LEVEL)
    assert texts.look_up(whole, True) == BYTE_LEVEL.decode([whole])
    assert texts.look_up(half, True) is None
    assert (texts.look_up(end, True), texts.look_up(end, False)) == (None, "</s>")
    assert texts.known(True) == {whole: BYTE_LEVEL.decode([whole]), half: None, end: None}
    # there, a token at the beginning has no space, and runs of bytes depend on each other
    assert TokenTexts(BYTE_FALLBACK).look_up(BYTE_FALLBACK.encode("the").ids[0], True) is None


@TOKENIZERS
@given(text=TEXTS, prompt=st.sampled_from(PROMPTS), spelled=st.booleans())
def test_preparing_an_answer_changes_nothing_in_its_text(
    tokenizer: Tokenizer, text: str, prompt: str, spelled: bool
) -> None:
    ids = _bytes_as_tokens(tokenizer, text.encode()) if spelled else tokenizer.encode(text).ids
    answers = [AnswerText(tokenizer, tokenizer.encode(prompt).ids, SamplingParams()) for _ in range(2)]
    answers[0].prepare()
    passages = [[answer.add([token_id], None) for token_id in ids] + [answer.add([], "length")] for answer in answers]
    assert passages[0] == passages[1]


class _Prompt(list[int]):
    """Counts how often it is looked at."""

    looks = 0

    def __getitem__(self, key):  # type: ignore[no-untyped-def]
        self.looks += 1
        return super().__getitem__(key)


@pytest.mark.parametrize(
    ("tokenizer", "looks"), [(BYTE_LEVEL, 0), (BYTE_FALLBACK, 1)], ids=["byte-level", "byte-fallback"]
)
def test_a_prompt_is_looked_at_beforehand_only_where_it_decides_how_an_answer_is_spelled(
    tokenizer: Tokenizer, looks: int
) -> None:
    prompt = _Prompt(tokenizer.encode("the").ids)
    answer = AnswerText(tokenizer, prompt, SamplingParams())
    assert prompt.looks == 0, "the request is not yet submitted"
    answer.prepare()
    assert prompt.looks == looks
    answer.add(tokenizer.encode(" question").ids, None)
    assert prompt.looks == looks


@TOKENIZERS
def test_a_leading_space_is_kept(tokenizer: Tokenizer) -> None:
    prompt_ids = tokenizer.encode("the").ids
    ids = tokenizer.encode("a the").ids[-1:]
    assert _steps(tokenizer, prompt_ids, ids)[0] == " the"


@TOKENIZERS
def test_a_split_character_is_held_back_until_it_is_whole(tokenizer: Tokenizer) -> None:
    ids = _bytes_as_tokens(tokenizer, "a😀b".encode())
    assert _steps(tokenizer, tokenizer.encode("the").ids, ids) == ["a", "", "", "", "😀", "b", ""]


@TOKENIZERS
def test_an_incomplete_character_is_flushed_at_the_end(tokenizer: Tokenizer) -> None:
    ids = _bytes_as_tokens(tokenizer, "a😀".encode()[:-1])
    *pieces, last = _steps(tokenizer, tokenizer.encode("the").ids, ids)
    assert "".join(pieces) == "a"
    assert set(last) == {"\ufffd"}


@TOKENIZERS
def test_special_tokens_are_shown_only_if_not_skipped(tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id("</s>")
    prompt_ids = tokenizer.encode("the").ids
    assert "".join(_steps(tokenizer, prompt_ids, [end], skip=True)) == ""
    assert "".join(_steps(tokenizer, prompt_ids, [end], skip=False)) == "</s>"


@TOKENIZERS
def test_text_after_many_special_tokens_is_exact(tokenizer: Tokenizer) -> None:
    prompt_ids = tokenizer.encode("the").ids
    ids = [1] * 100 + tokenizer.encode("a the").ids + [1] * 100 + tokenizer.encode("a the").ids
    assert "".join(_steps(tokenizer, prompt_ids, ids)) == _after_prompt(tokenizer, prompt_ids, ids)


@TOKENIZERS
def test_a_long_run_of_invalid_bytes_costs_no_more_than_other_text(tokenizer: Tokenizer) -> None:
    """DecodeStream alone takes quadratic time and sends nothing until the end."""
    detokenizer = Detokenizer(tokenizer, [5], True)
    (invalid,) = _bytes_as_tokens(tokenizer, b"\x80")
    started = time.perf_counter()
    pieces = [detokenizer.step(invalid) for _ in range(5000)]
    assert time.perf_counter() - started < 2
    assert len("".join(pieces)) >= 4990
    assert len("".join(pieces) + detokenizer.flush()) == 5000


def _scan(text: str, strings: list[str], include: bool) -> tuple[str, bool]:
    """The definition of StopStrings, one character after another."""
    for end in range(1, len(text) + 1):
        found = [string for string in strings if text[:end].endswith(string)]
        if found:
            return (text[:end] if include else text[: end - max(map(len, found))]), True
    return text, False


@given(
    pieces=st.lists(st.text(alphabet="abc", max_size=5), max_size=12),
    strings=st.lists(st.text(alphabet="abc", min_size=1, max_size=5), max_size=4),
    include=st.booleans(),
)
def test_stop_strings_are_found_however_the_text_is_split(pieces: list[str], strings: list[str], include: bool) -> None:
    stops = StopStrings(strings, include)
    sent: list[str] = []
    stopped = False
    for piece in pieces:
        text, stopped = stops.push(piece)
        sent.append(text)
        if stopped:
            break
    if not stopped:
        sent.append(stops.flush())
    assert ("".join(sent), stopped) == _scan("".join(pieces), strings, include)


@given(
    pieces=st.lists(st.text(alphabet="ab", max_size=3), max_size=12),
    strings=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
)
def test_text_is_held_back_only_if_it_may_begin_a_stop_string(pieces: list[str], strings: list[str]) -> None:
    stops = StopStrings(strings, include=False)
    seen = sent = ""
    for piece in pieces:
        text, stopped = stops.push(piece)
        seen, sent = seen + piece, sent + text
        if stopped:
            break
        pending = seen[len(sent) :]
        assert not pending or any(string.startswith(pending) for string in strings)
        assert not any(
            string.startswith(seen[-length:])
            for string in strings
            for length in range(len(pending) + 1, min(len(seen), len(string)) + 1)
        )


def test_many_long_stop_strings_cost_little_per_character() -> None:
    """64 strings of 1,000 characters that all match nearly everywhere: what the limits on stop strings allow."""
    stops = StopStrings(["a" * length + "b" for length in range(960, 1024)], include=False)
    started = time.perf_counter()
    sent = [stops.push("aaaaaaac")[0] for _ in range(2000)]
    assert time.perf_counter() - started < 1
    assert "".join(sent) == "aaaaaaac" * 2000


def _answer(tokenizer: Tokenizer, text: str, **options: object) -> AnswerText:
    return AnswerText(tokenizer, tokenizer.encode("the").ids, SamplingParams(**options))  # type: ignore[arg-type]


@TOKENIZERS
def test_a_stop_string_across_tokens_cuts_the_text_before_it_and_drops_later_tokens(tokenizer: Tokenizer) -> None:
    ids = _bytes_as_tokens(tokenizer, b"hello STOP here")
    passage = _answer(tokenizer, "", stop=("STOP",)).add(ids, None)
    assert (passage.text, passage.num_tokens, passage.stopped) == ("hello ", 10, True)


@TOKENIZERS
def test_the_stop_string_can_be_part_of_the_text(tokenizer: Tokenizer) -> None:
    ids = _bytes_as_tokens(tokenizer, b"hello STOP here")
    passage = _answer(tokenizer, "", stop=("STOP",), include_stop_str_in_output=True).add(ids, None)
    assert (passage.text, passage.stopped) == ("hello STOP", True)


@TOKENIZERS
def test_a_stop_string_within_min_tokens_is_text(tokenizer: Tokenizer) -> None:
    answer = _answer(tokenizer, "", stop=("ab",), min_tokens=2)
    assert answer.add(_bytes_as_tokens(tokenizer, b"ab"), None).stopped is False
    passage = answer.add(_bytes_as_tokens(tokenizer, b"cab"), None)
    assert (passage.text, passage.stopped) == ("abc", True)


@TOKENIZERS
def test_the_text_of_a_stop_token_is_not_sent_unless_asked_for(tokenizer: Tokenizer) -> None:
    ids = _bytes_as_tokens(tokenizer, b"abc")
    assert _answer(tokenizer, "").add(ids, "stop").text == "ab"
    assert _answer(tokenizer, "").add(ids, "length").text == "abc"
    assert _answer(tokenizer, "", include_stop_str_in_output=True).add(ids, "stop").text == "abc"


@TOKENIZERS
def test_a_stop_string_that_is_a_special_token_is_part_of_the_text_only_if_asked_for(tokenizer: Tokenizer) -> None:
    ids = [*_bytes_as_tokens(tokenizer, b"abc"), tokenizer.token_to_id("</s>")]
    for include in (False, True):
        answer = _answer(tokenizer, "", stop=("</s>",), include_stop_str_in_output=include)
        assert answer.add(ids, "stop").text == ("abc</s>" if include else "abc")


@TOKENIZERS
def test_the_beginning_of_a_stop_string_is_sent_when_the_answer_ends_without_the_rest(tokenizer: Tokenizer) -> None:
    answer = _answer(tokenizer, "", stop=("bcd",))
    first = answer.add(_bytes_as_tokens(tokenizer, b"abc"), None)
    assert first.text == "a"
    assert answer.add(_bytes_as_tokens(tokenizer, b"x"), "length").text == "bcx"
    answer = _answer(tokenizer, "", stop=("bcd",))
    assert answer.add(_bytes_as_tokens(tokenizer, b"abc"), "length").text == "abc"


@settings(max_examples=200)
@given(
    text=st.text(alphabet="ab é😀", max_size=30),
    stop=st.lists(st.text(alphabet="ab é", min_size=1, max_size=3), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 100), max_size=6),
    min_tokens=st.integers(0, 4),
)
def test_an_answers_text_does_not_depend_on_how_its_tokens_arrive(
    text: str, stop: list[str], cuts: list[int], min_tokens: int
) -> None:
    ids = BYTE_LEVEL.encode(text).ids

    def pieces(borders: list[int]) -> tuple[str, int, bool]:
        answer = _answer(BYTE_LEVEL, "", stop=tuple(stop), min_tokens=min_tokens)
        sent, num_tokens = "", 0
        for start, end in zip([0, *borders], [*borders, len(ids)], strict=True):
            passage = answer.add(ids[start:end], "length" if end == len(ids) else None)
            sent, num_tokens = sent + passage.text, num_tokens + passage.num_tokens
            if passage.stopped:
                return sent, num_tokens, True
        return sent, num_tokens, False

    assert pieces(sorted({cut % max(1, len(ids)) for cut in cuts})) == pieces([])


def test_without_a_tokenizer_there_is_no_text() -> None:
    passage = AnswerText(None, [1], SamplingParams()).add([1, 2, 3], "length")
    assert (passage.text, passage.num_tokens, passage.stopped) == ("", 3, False)


@TOKENIZERS
def test_sequences_of_one_request_share_the_tree_of_its_stop_strings_and_not_how_far_they_are_in_it(
    tokenizer: Tokenizer,
) -> None:
    sampling = SamplingParams(stop=("abcd",))
    stops = stops_of(sampling)
    first, second = (AnswerText(tokenizer, [], sampling, stops) for _ in range(2))
    assert first._stops is not None and second._stops is not None and stops is not None
    assert first._stops._next is second._stops._next
    assert first._stops.push("xab") == ("x", False)
    assert second._stops.push("cd") == ("cd", False)
    assert first._stops.push("cd!") == ("", True)
    assert second._stops.push("yab") == ("y", False)
