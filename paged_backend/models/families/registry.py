"""The families that are served. A new one is a file beside this and a name in the list."""

from __future__ import annotations

from paged_backend.models.families.cohere2 import COHERE2
from paged_backend.models.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from paged_backend.models.families.exaone4 import EXAONE4
from paged_backend.models.families.gemma2 import GEMMA2
from paged_backend.models.families.gemma3 import GEMMA3, GEMMA3_WITH_IMAGES
from paged_backend.models.families.glm4 import GLM, GLM4
from paged_backend.models.families.glm4_moe import GLM4_MOE
from paged_backend.models.families.glm4_moe_lite import GLM4_MOE_LITE
from paged_backend.models.families.gpt_oss import GPT_OSS
from paged_backend.models.families.granite import GRANITE
from paged_backend.models.families.internlm3 import INTERNLM3
from paged_backend.models.families.llama import LLAMA
from paged_backend.models.families.mimo import MIMO
from paged_backend.models.families.minimax_m2 import MINIMAX_M2
from paged_backend.models.families.ministral3 import MINISTRAL3, MISTRAL3_WITH_IMAGES
from paged_backend.models.families.mistral import MISTRAL
from paged_backend.models.families.mixtral import MIXTRAL
from paged_backend.models.families.olmo import OLMO2, OLMO3
from paged_backend.models.families.phi3 import PHI3
from paged_backend.models.families.qwen2 import QWEN2
from paged_backend.models.families.qwen2_moe import QWEN2_MOE
from paged_backend.models.families.qwen3 import QWEN3
from paged_backend.models.families.qwen3_moe import QWEN3_MOE
from paged_backend.models.families.qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL, QWEN3_VL_MOE
from paged_backend.models.families.seed_oss import SEED_OSS
from paged_backend.models.families.smollm3 import SMOLLM3
from paged_backend.models.families.starcoder2 import STARCODER2

_DENSE = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    COHERE2,
    EXAONE4,
    GEMMA2,
    GEMMA3,
    GEMMA3_WITH_IMAGES,
    GLM,
    GLM4,
    GRANITE,
    INTERNLM3,
    MIMO,
    MINISTRAL3,
    MISTRAL3_WITH_IMAGES,
    OLMO2,
    OLMO3,
    PHI3,
    QWEN2_VL,
    QWEN2_5_VL,
    QWEN3_VL,
    SEED_OSS,
    SMOLLM3,
    STARCODER2,
)
_EXPERTS = (
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    QWEN3_VL_MOE,
    GLM4_MOE,
    MINIMAX_M2,
    GPT_OSS,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GLM4_MOE_LITE,
)
FAMILIES = {family.architecture: family for family in (*_DENSE, *_EXPERTS)}
