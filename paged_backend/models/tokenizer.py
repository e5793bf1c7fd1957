"""Exports a checkpoint's tokenizer in the one format that needs neither transformers nor torch to read: tokenizer.json;
and its chat template.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from paged_backend.errors import EngineError, reason_of
from paged_backend.messages import ExportedTemplate
from paged_backend.models.chat_template_syntax import template_mistakes
from paged_backend.models.shipped_tokenizer import follow_shipped
from paged_backend.models.tokenizer_files import TokenizerFormat, find_tokenizer

log = logging.getLogger("paged")


@dataclass(frozen=True)
class ExportedTokenizer:
    """A tokenizer in files that front ends read."""

    path: Path  # tokenizer.json
    eos_id: int | None  # the tokenizer's own, with which answers end


def export_tokenizer(folder: Path, path: Path) -> ExportedTokenizer | None:
    """Writes the tokenizer that transformers loads from `folder` to `path`, as the Rust library's JSON; None if the
    folder has no tokenizer. If it has a chat template, that goes to chat_template.json beside it; the log tells a
    mistake in it.

    Front ends read that file with the `tokenizers` package alone, which keeps them small (no torch in any of them), and
    they tokenise as the checkpoint's own tokenizer.json says, or else as transformers does, whatever the checkpoint's
    format is.

    Raises:
        EngineError: the folder has tokenizer files, but transformers cannot make a fast tokenizer of them.
    """
    form = find_tokenizer(folder)
    if form is None:
        return None
    try:
        tokenizer = _tekken(folder / form.value) if form is TokenizerFormat.TEKKEN else _auto(folder)
        backend = follow_shipped(folder, tokenizer.backend_tokenizer)
    except (
        Exception
    ) as error:  # transformers raises whatever the parser of the day raises, or a package that it imports
        raise EngineError(f"the tokenizer in '{folder}' cannot be loaded: {reason_of(error)}") from error
    backend.no_truncation()
    backend.no_padding()
    backend.save(str(path))
    if tokenizer.chat_template:
        exported = _chat_template(tokenizer)
        for mistake in template_mistakes(exported.templates, folder):
            log.warning("%s", mistake)
        path.with_name("chat_template.json").write_bytes(msgspec.json.encode(exported))
    return ExportedTokenizer(path, None if tokenizer.eos_token is None else backend.token_to_id(tokenizer.eos_token))


def _auto(folder: Path) -> Any:
    from transformers import AutoTokenizer

    # mistral-common's own class has no tokenizer.json to export
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, mistral_format=False)


def _tekken(path: Path) -> Any:
    """Mistral's own format. mistral-common knows the chat template; texts begin with <s>, as it encodes them."""
    from tokenizers import processors
    from transformers.integrations.mistral import convert_tekken_tokenizer  # type: ignore[attr-defined]

    tokenizer = convert_tekken_tokenizer(str(path))
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def _chat_template(tokenizer: Any) -> ExportedTemplate:
    template = tokenizer.chat_template
    templates = template if isinstance(template, dict) else {"default": template}
    return ExportedTemplate(templates, dict(tokenizer.special_tokens_map), _response_template(tokenizer))


def _response_template(tokenizer: Any) -> dict[str, Any] | None:
    """None also for one that is no JSON: nobody could be told of it."""
    template = getattr(tokenizer, "response_template", None)
    try:
        return None if template is None else msgspec.json.decode(msgspec.json.encode(template), type=dict[str, Any])
    except (TypeError, ValueError, msgspec.MsgspecError):
        return None
