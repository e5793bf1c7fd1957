"""Exports a checkpoint's tokenizer in the one format that needs neither transformers nor torch to read: tokenizer.json; and its chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from paged_backend.errors import EngineError
from paged_backend.messages import ExportedTemplate
from paged_backend.models.shipped_tokenizer import follow_shipped

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def export_tokenizer(folder: Path, path: Path) -> Path | None:
    """Writes the tokenizer that transformers loads from `folder` to `path`, as the Rust library's JSON; None if the folder has no tokenizer.
    If it has a chat template, that goes to chat_template.json beside it.

    Front ends read that file with the `tokenizers` package alone, which keeps them small (no torch in any of them), and they tokenise as the
    checkpoint's own tokenizer.json says, or else as transformers does, whatever the checkpoint's format is.

    Raises:
        EngineError: the folder has tokenizer files, but transformers cannot make a fast tokenizer of them.
    """
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        backend = follow_shipped(folder, tokenizer.backend_tokenizer)
    except Exception as error:  # transformers raises whatever the parser of the day raises, or a package that it imports
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EngineError(f"the tokenizer in '{folder}' cannot be loaded: {reason}") from error
    backend.no_truncation()
    backend.no_padding()
    backend.save(str(path))
    if tokenizer.chat_template:
        path.with_name("chat_template.json").write_bytes(msgspec.json.encode(_chat_template(tokenizer)))
    return path


def _chat_template(tokenizer: Any) -> ExportedTemplate:
    template = tokenizer.chat_template
    return ExportedTemplate(template if isinstance(template, dict) else {"default": template}, dict(tokenizer.special_tokens_map))
