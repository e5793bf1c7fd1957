"""The table of `paged models`, as JSON on stdout: `python -m paged_backend.models.table`. A process of its own, for the
registry needs transformers.
"""

from __future__ import annotations

import json

from paged_backend.models.families.registry import FAMILIES
from paged_backend.models.quantization.reading import METHODS


def table() -> dict[str, list[dict[str, str]] | list[str]]:
    """`families`: architecture, model_type and models of each. `formats`: names of quant_method that config.json may
    have.
    """
    rows = [
        {"architecture": family.architecture, "model_type": family.model_type, "models": family.models}
        for family in FAMILIES.values()
    ]
    return {"families": rows, "formats": list(METHODS)}


if __name__ == "__main__":
    print(json.dumps(table()))
