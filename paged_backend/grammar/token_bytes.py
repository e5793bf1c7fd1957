"""What each token of a vocabulary spells, in bytes: what a grammar sees of it, and what log-probabilities are told
of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

# decoders whose tokens `_spell` knows
_SPELLABLE = frozenset({"ByteLevel", "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip", "Sequence"})
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """What single tokens spell inside a text, special ones too. A token may be part of a character, or begin with a
    space that `decode` would drop.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._kinds = _kinds_of(tokenizer)
        self._added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}

    def of(self, token_id: int) -> bytes:
        """Empty for an id that only the model has."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._kinds <= _SPELLABLE:
            return _spell(token, self._kinds)
        # WordPiece and others, whose tokens are text
        return self._tokenizer.decode([token_id], skip_special_tokens=False).encode()


def read_token_bytes(path: Path, vocab_size: int, silent_ids: Collection[int]) -> list[bytes]:
    """One entry per id of the model, empty where a token has no place in an answer that follows a grammar: special
    tokens, `silent_ids`, and ids that only the model has.

    path: a tokenizer.json.
    """
    tokenizer = Tokenizer.from_file(str(path))
    kinds = _kinds_of(tokenizer)
    added = tokenizer.get_added_tokens_decoder()
    spelled = [b""] * vocab_size
    for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        if token_id >= vocab_size or token_id in silent_ids:
            continue
        if token_id in added:
            spelled[token_id] = b"" if added[token_id].special else token.encode()  # written as they are
        else:
            spelled[token_id] = _spell(token, kinds)
    return spelled


def _kinds_of(tokenizer: Tokenizer) -> set[str]:
    return set() if tokenizer.decoder is None else set(_decoders(json.loads(tokenizer.decoder.__getstate__())))


def _decoders(decoder: Any) -> Iterator[str]:
    """The types of a decoder and of those in it; a replacement of ▁ by a space counts as Metaspace."""
    if not isinstance(decoder, dict):
        return
    yield decoder["type"]
    if decoder["type"] == "Replace" and decoder.get("pattern") == {"String": "▁"} and decoder.get("content") == " ":
        yield "Metaspace"
    for inner in decoder.get("decoders", ()):
        yield from _decoders(inner)


def _spell(token: str, kinds: set[str]) -> bytes:
    if "ByteLevel" in kinds:
        return b"".join(bytes([_BYTES[char]]) if char in _BYTES else char.encode() for char in token)
    if "ByteFallback" in kinds:
        piece = _BYTE_PIECE.fullmatch(token)
        if piece is not None:
            return bytes.fromhex(piece[1])
    return (token.replace("▁", " ") if "Metaspace" in kinds else token).encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others for 256 and on. Source:
    openai/gpt-2, src/encoder.py.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(rest)}


_BYTES = _byte_alphabet()
