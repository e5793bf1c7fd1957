"""A model's tokens as the grammar library sees them. The library is xgrammar (Dong et al., 2024, arXiv:2411.15100), an
optional extra.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paged_backend.arrays import Int32, bits
from paged_backend.errors import ErrorKind
from paged_backend.extras import install_command
from paged_backend.grammar.token_bytes import read_token_bytes
from paged_backend.grammar.utf8 import CLEAN, STATES, advance


class GrammarError(Exception):
    """Why a grammar cannot be followed; a clause for the caller."""

    def __init__(self, message: str, kind: ErrorKind = ErrorKind.INVALID) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Vocabulary:
    """Masks are a bit per token, the first in the lowest, in words of int32."""

    xgrammar: Any  # the module
    tokens: Any  # its TokenizerInfo
    size: int
    spelled: Sequence[bytes]  # empty: no part of an answer that follows a grammar
    following: Sequence[Int32]  # by state of utf8.py: the tokens whose bytes may come
    # the tokens whose only control characters are line breaks: JSON's strings must have none, and the library lets them
    # in
    clean_or_lines: Int32


def read_vocabulary(tokenizer_path: Path | None, size: int, eos_ids: Collection[int]) -> Vocabulary:
    """tokenizer_path: a tokenizer.json; None: the model has none. size: of the logits.

    Raises:
        GrammarError: there is nothing to compile grammars for, or with.
    """
    if tokenizer_path is None:
        raise GrammarError("this model has no tokenizer")
    try:
        import xgrammar
    except ImportError as error:
        command = install_command("structured")
        raise GrammarError(
            f"structured output needs the package xgrammar, which is not installed in this server: {command}",
            ErrorKind.UNSUPPORTED,
        ) from error
    spelled = read_token_bytes(tokenizer_path, size, eos_ids)
    return Vocabulary(
        xgrammar=xgrammar,
        tokens=xgrammar.TokenizerInfo(spelled, xgrammar.VocabType.RAW, vocab_size=size, stop_token_ids=[]),
        size=size,
        spelled=spelled,
        following=_following(spelled, size),
        clean_or_lines=bits(
            [token_id for token_id, text in enumerate(spelled) if min(text.replace(b"\n", b""), default=32) >= 32], size
        ),
    )


def _following(spelled: Sequence[bytes], size: int) -> list[Int32]:
    ascii_ids = [token_id for token_id, text in enumerate(spelled) if text.isascii()]
    others = [(token_id, text) for token_id, text in enumerate(spelled) if not text.isascii()]
    return [
        bits(
            [
                *(ascii_ids if state == CLEAN else ()),
                *(token_id for token_id, text in others if advance(state, text) is not None),
            ],
            size,
        )
        for state in STATES
    ]
