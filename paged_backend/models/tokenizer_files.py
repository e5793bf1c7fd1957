"""The formats in which checkpoints bring a tokenizer, what each needs, and ids that no vocabulary has: looked at before
anything is made of the files.
"""

from __future__ import annotations

import re
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from paged_backend.errors import EngineError, reason_of
from paged_backend.extras import install_command
from paged_backend.models.config_file import MAX_VOCAB_SIZE

_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s")  # the first of a file: base64, and the token's id


class TokenizerFormat(Enum):
    """A file that is enough for a tokenizer, in the order in which they are preferred."""

    HUGGING_FACE = "tokenizer.json"
    VOCABULARY = "vocab.json"
    SENTENCE_PIECE = "tokenizer.model"
    TEKKEN = "tekken.json"


class _AddedToken(msgspec.Struct):
    id: int


class _Model(msgspec.Struct):
    vocab: dict[str, int] | list[Any] = {}


class _TokenizerFile(msgspec.Struct):
    added_tokens: list[_AddedToken] = []
    model: _Model = msgspec.field(default_factory=_Model)


class _TokenizerConfig(msgspec.Struct):
    added_tokens_decoder: dict[int, Any] = {}


class _TekkenSizes(msgspec.Struct):
    default_num_special_tokens: int | None = None
    default_vocab_size: int | None = None


class _Tekken(msgspec.Struct):
    config: _TekkenSizes


def find_tokenizer(folder: Path) -> TokenizerFormat | None:
    """How the checkpoint brings its tokenizer; None if it has none.

    Raises:
        EngineError: a package that the format needs is missing or cannot be imported, or an id is too large; one
            sentence.
    """
    found = next((form for form in TokenizerFormat if (folder / form.value).is_file()), None)
    if found is None and (folder / "tokenizer_config.json").is_file():
        raise EngineError(
            f"the tokenizer in '{folder}' cannot be loaded: it has tokenizer_config.json, but none of "
            f"{', '.join(f.value for f in TokenizerFormat)}"
        )
    if found is TokenizerFormat.SENTENCE_PIECE:
        _require_sentence_piece(folder / found.value)
    if found is TokenizerFormat.TEKKEN and find_spec("mistral_common") is None:
        raise EngineError(
            f"the tokenizer is tekken.json alone, which needs the package mistral-common: {install_command('tekken')}"
        )
    _check_ids(folder)
    return found


def _require_sentence_piece(path: Path) -> None:
    with path.open("rb") as file:
        if _TIKTOKEN_LINE.match(file.read(4096)):
            if find_spec("tiktoken") is None:
                raise EngineError(
                    "the tokenizer is tokenizer.model alone, in tiktoken's format, which needs the package "
                    "tiktoken: pip install tiktoken"
                )
            return
    try:
        from sentencepiece import sentencepiece_model_pb2  # noqa: F401 - its newest releases want a newer protobuf than Triton Server's client
    except Exception as error:
        reason = (
            "" if isinstance(error, ModuleNotFoundError) else f" (what is installed cannot be used: {reason_of(error)})"
        )
        raise EngineError(
            "the tokenizer is tokenizer.model alone, which needs the packages sentencepiece and "
            f"protobuf{reason}: {install_command('sentencepiece')}"
        ) from None


def _check_ids(folder: Path) -> None:
    """Files that are no JSON, or of another form, are left to those who read all of them."""
    for name, form, ids_of in (
        (TokenizerFormat.HUGGING_FACE.value, _TokenizerFile, _ids_of_tokenizer),
        ("tokenizer_config.json", _TokenizerConfig, lambda file: list(file.added_tokens_decoder)),
        ("vocab.json", dict[str, int], lambda file: list(file.values())),
        ("added_tokens.json", dict[str, int], lambda file: list(file.values())),
        (
            TokenizerFormat.TEKKEN.value,
            _Tekken,
            lambda file: [file.config.default_num_special_tokens or 0, file.config.default_vocab_size or 0],
        ),
    ):
        try:
            content: Any = msgspec.json.decode((folder / name).read_bytes(), type=form)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        largest = max(ids_of(content), default=0)
        if largest > MAX_VOCAB_SIZE:
            raise EngineError(f"{name}: {largest} is no token id; the largest allowed is {MAX_VOCAB_SIZE}")


def _ids_of_tokenizer(file: _TokenizerFile) -> list[int]:
    vocabulary = file.model.vocab
    return [token.id for token in file.added_tokens] + (
        list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    )
