"""generation_config.json: where answers end, and the sampling that a checkpoint's makers recommend."""

from __future__ import annotations

from pathlib import Path

from paged_backend.errors import RequestError
from paged_backend.models.architecture import Architecture
from paged_backend.models.config_file import CheckedFile, TokenId, TokenIds, checked, read_json
from paged_backend.request import parse_sampling

_FILE = "generation_config.json"
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")


class GenerationConfig(CheckedFile):
    """The keys of generation_config.json that are used here."""

    bos_token_id: TokenId | None = None
    eos_token_id: TokenIds | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None

    @classmethod
    def read(cls, folder: Path) -> GenerationConfig:
        """Of a checkpoint's folder; empty if it has no such file.

        Raises:
            EngineError: the file is broken, or a value is of a wrong type; the sentence names key and value.
        """
        path = folder / _FILE
        return checked(cls, read_json(path), _FILE) if path.is_file() else cls()


def recommended_sampling(generation: GenerationConfig, max_model_len: int) -> tuple[dict[str, float], list[str]]:
    """Sampling keys with the values that the checkpoint's makers recommend, as `vllm serve` reads them, and a warning
    for each value that is out of range and left out. Like there, `do_sample` does not matter: who wants greedy answers
    says temperature 0.
    """
    values, warnings = {}, []
    for name in _SAMPLING:
        value = getattr(generation, name)
        if value is None:
            continue
        key, value = ("max_tokens", min(value, max_model_len)) if name == "max_new_tokens" else (name, value)
        try:
            parse_sampling({key: value})
        except RequestError as error:
            warnings.append(f"warning: {_FILE}: {error}: left out of what it recommends")
        else:
            values[key] = value
    return values, warnings


def find_stop_ids(
    architecture: Architecture, generation: GenerationConfig, tokenizer_eos: int | None
) -> dict[int, str]:
    """The ids at which an answer ends, each with the reason: where the checkpoint says so.

    Those of generation_config.json, or config.json's where it has none: transformers' generate does the same. The
    tokenizer's own too, as in vLLM: a chat model's turns may end with a token that only its tokenizer_config.json calls
    eos. Ids that the vocabulary has not can never come, and are left out.
    """
    reasons: dict[int, str] = {}
    if generation.eos_token_id is not None:
        ids, source = tuple(generation.eos_token_id), _FILE
    else:
        ids, source = architecture.eos_ids, "config.json"
    for token_id in ids:
        reasons[token_id] = source
    if tokenizer_eos is not None:
        reasons[tokenizer_eos] = (
            f"{reasons[tokenizer_eos]}, the tokenizer's eos" if tokenizer_eos in reasons else "the tokenizer's eos"
        )
    return {token_id: reason for token_id, reason in reasons.items() if 0 <= token_id < architecture.vocab_size}
