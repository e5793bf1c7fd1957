"""The families that are served. A new one is a file beside this and a name in the list."""

from __future__ import annotations

from paged_backend.models.families.llama import LLAMA
from paged_backend.models.families.mistral import MISTRAL
from paged_backend.models.families.qwen2 import QWEN2
from paged_backend.models.families.qwen3 import QWEN3

FAMILIES = {family.architecture: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}
