"""Which room does what a batch asks: the one table of the runner's features."""

from __future__ import annotations

from collections.abc import Mapping

from paged_backend.batch import AdapterUse, Ask, BeamRows, LastThoughts, Pooling, PromptScoring, TokenMasks
from paged_backend.runner.adapter_store import AdapterRoom
from paged_backend.runner.asks import AskRoom
from paged_backend.runner.beam_candidates import BeamRoom
from paged_backend.runner.embeddings import PoolingRoom
from paged_backend.runner.prompt_scores import PromptRoom
from paged_backend.runner.token_masks import MaskRoom

ROOMS: Mapping[type[Ask], AskRoom] = {
    AdapterUse: AdapterRoom(),
    TokenMasks: MaskRoom(),
    BeamRows: BeamRoom(),
    PromptScoring: PromptRoom(),
    Pooling: PoolingRoom(),
    LastThoughts: AskRoom(),
}


def room_of(ask: Ask) -> AskRoom:
    return ROOMS[type(ask)]
