"""The families that are served. A new one is a file beside this and a name in the list."""

from __future__ import annotations

from paged_backend.models.families.llama import LLAMA
from paged_backend.models.families.mistral import MISTRAL
from paged_backend.models.families.mixtral import MIXTRAL
from paged_backend.models.families.qwen2 import QWEN2
from paged_backend.models.families.qwen2_moe import QWEN2_MOE
from paged_backend.models.families.qwen3 import QWEN3
from paged_backend.models.families.qwen3_moe import QWEN3_MOE

FAMILIES = {family.architecture: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN2_MOE, QWEN3_MOE)}
