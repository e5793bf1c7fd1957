"""The bytes of a vocabulary spell what the tokenizer decodes, and what must not come is empty."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

from paged_backend.grammar.token_bytes import TokenBytes, read_token_bytes
from tests.small_tokenizers import byte_fallback, byte_level

TEXTS = ["the answer", " to the question", 'wörld € 😀 日本語\n\t{"a": 1}', "x  y", "\x00\x7f", "\x80\xad¡"]


def saved(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_tokens_spell_their_text(tmp_path: Path, text: str) -> None:
    spelled = read_token_bytes(saved(byte_level(), tmp_path), 600, ())
    assert b"".join(spelled[token_id] for token_id in byte_level().encode(text).ids) == text.encode()


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_with_byte_fallback_spell_their_text(tmp_path: Path, text: str) -> None:
    spelled = read_token_bytes(saved(byte_fallback(), tmp_path), 400, ())
    assert (
        b"".join(spelled[token_id] for token_id in byte_fallback().encode(text, add_special_tokens=False).ids)
        == f" {text}".encode()
    )


def test_special_silent_and_unknown_tokens_are_empty_and_added_ones_are_as_written(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<tool é>", normalized=False), AddedToken("  ", normalized=False)])
    ids = {name: tokenizer.token_to_id(name) for name in ("<s>", "</s>", "<tool é>", "  ", "a")}
    spelled = read_token_bytes(saved(tokenizer, tmp_path), 600, (ids["a"],))
    assert [spelled[ids[name]] for name in ids] == [b"", b"", "<tool é>".encode(), b"  ", b""]
    assert spelled[tokenizer.get_vocab_size() :] == [b""] * (600 - tokenizer.get_vocab_size())
    assert len(read_token_bytes(saved(tokenizer, tmp_path), 100, ())) == 100  # a model that has fewer


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("text", TEXTS)
def test_single_tokens_spell_their_part_of_a_text(make: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = make()
    spelled = [TokenBytes(tokenizer).of(token_id) for token_id in tokenizer.encode(text).ids]
    assert b"".join(spelled).decode().removeprefix("<s>").removeprefix("" if make is byte_level else " ") == text
    assert TokenBytes(tokenizer).of(10**6) == b""


def test_tokens_of_other_decoders_are_text() -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    assert TokenBytes(tokenizer).of(1) == b"play"
