"""How well a model in training does on conversations it will never be trained on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tools.demo_model.chat import Weight
from tools.demo_model.model import DemoModel, attention_by_document, documents_of, masked_attention
from tools.demo_model.shards import ID_BITS

_ROWS_AT_ONCE = 4
_MEASURED = (Weight.GIVEN, Weight.FREE, Weight.EXACT)


def split_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int16 rows as shards.py writes them -> ids and weight codes, int64 each."""
    return (rows & ((1 << ID_BITS) - 1)).long(), (rows >> ID_BITS).long()


@torch.no_grad()
def validate(model: DemoModel, rows: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Losses in nats per token of each weight, and the share of exact answers: each of their tokens the likeliest after
    those before it. rows: int16 [N, T].
    """
    sums, counts = torch.zeros(4, device=rows.device), torch.zeros(4, device=rows.device)
    wrong, codes_seen = [], []
    for some in rows.split(_ROWS_AT_ONCE):
        ids, codes = split_rows(some)
        attention = masked_attention if ids.is_cuda else attention_by_document
        logits = model(ids, attention(documents_of(ids)), dtype)[:, :-1].float()
        losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        sums.index_add_(0, codes[:, 1:].flatten(), losses)
        counts.index_add_(0, codes[:, 1:].flatten(), torch.ones_like(losses))
        wrong.append((logits.argmax(-1) != ids[:, 1:]).cpu().numpy())
        codes_seen.append(codes[:, 1:].cpu().numpy())
    means = (sums / counts.clamp(min=1)).tolist()
    losses_by_weight = {weight.name.lower(): round(means[weight.value], 4) for weight in _MEASURED}
    return {
        **losses_by_weight,
        "exact_answers": round(exact_answers(np.concatenate(wrong), np.concatenate(codes_seen)), 4),
    }


def exact_answers(wrong: NDArray[np.bool_], codes: NDArray[np.int64]) -> float:
    """The share of answers without a wrong token. An answer is a run of tokens of weight EXACT. Both [N, T]."""
    counts = (codes == Weight.EXACT.value).flatten()
    before = np.pad(codes == Weight.EXACT.value, ((0, 0), (1, 0)))[:, :-1].flatten()
    answer = np.cumsum(counts & ~before)[counts] - 1
    if not len(answer):
        return 0.0
    failures = np.bincount(answer, weights=wrong.flatten()[counts])
    return float((failures == 0).mean())
