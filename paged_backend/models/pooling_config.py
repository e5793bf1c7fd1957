"""Which hidden states a checkpoint's makers pool into an embedding: 1_Pooling/config.json, as sentence-transformers
writes it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from paged_backend.models.config_file import CheckedFile, checked, read_json

_FILE = "1_Pooling/config.json"

log = logging.getLogger("paged")


class PoolingConfig(CheckedFile):
    """The keys of 1_Pooling/config.json that are used here."""

    pooling_mode_lasttoken: bool = False
    pooling_mode_mean_tokens: bool = False


def recommended_pooling(folder: Path) -> Literal["last", "mean"]:
    """What a request for an embedding gets that does not say: the checkpoint's own way, or else the last token, which
    alone has seen all others.

    Raises:
        EngineError: the file is broken.
    """
    path = folder / _FILE
    if not path.is_file():
        return "last"
    config = checked(PoolingConfig, read_json(path), _FILE)
    if config.pooling_mode_lasttoken == config.pooling_mode_mean_tokens:
        log.warning(
            "warning: %s asks for a pooling other than the last token's or the mean: embeddings are the last token's",
            _FILE,
        )
    return "mean" if config.pooling_mode_mean_tokens and not config.pooling_mode_lasttoken else "last"
