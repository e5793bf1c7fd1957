"""What Triton Server's own part of config.pbtxt says, as far as it matters here: tensors, and whether a request may
have several responses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paged_backend.errors import EngineError

_PROMPTS = ("text_input", "input_ids", "messages")
_OUTPUT = "text_output"


def check_tensors(model_config: Mapping[str, Any]) -> None:
    """
    Raises:
        EngineError: every request would be refused for want of tensors. A config that is given with a load is all there
            is: config.pbtxt is not read then.
    """
    inputs = {tensor["name"] for tensor in model_config.get("input", ())}
    outputs = {tensor["name"] for tensor in model_config.get("output", ())}
    missing = []
    if not inputs & set(_PROMPTS):
        missing.append(f"no input of {', '.join(_PROMPTS)}")
    if _OUTPUT not in outputs:
        missing.append(f"no output {_OUTPUT}")
    if missing:
        raise EngineError(
            f"the model's config declares {' and '.join(missing)}, so every request would be refused: a config "
            "given with a load replaces config.pbtxt, "
            "give the whole of it"
        )


def may_stream(model_config: Mapping[str, Any]) -> bool:
    """Whether a request may have several responses (model_transaction_policy)."""
    return bool(model_config.get("model_transaction_policy", {}).get("decoupled", True))
