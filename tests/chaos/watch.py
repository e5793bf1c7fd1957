"""What a campaign looks at while it runs: memory, and how far it is."""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from typing import TYPE_CHECKING

from tests.chaos.plague import Diary, Plague

if TYPE_CHECKING:
    from tests.chaos.workers import Campaign, Door

_SAMPLE_SECONDS = 2.0
_PROGRESS_SECONDS = 10.0


class Watch:
    """Memory of the front ends and the server, sampled; and progress, told."""

    def __init__(self, door: Door, campaign: Campaign, plague: Plague, diary: Diary) -> None:
        self._door, self._campaign, self._plague, self._diary = door, campaign, plague, diary
        self._samples: list[dict[str, int]] = []

    async def run(self) -> None:
        """Until cancelled."""
        started = told = time.monotonic()
        while True:
            await asyncio.sleep(_SAMPLE_SECONDS)
            self._diary.read()
            if self._door.alive():
                self._samples.append(self._door.memory())
            now = time.monotonic()
            if now > told + _PROGRESS_SECONDS:
                told, campaign = now, self._campaign
                words = (
                    f"{now - started:.0f} s: {campaign.requests} requests, {campaign.tokens} tokens, "
                    f"{self._plague.kills} kills"
                )
                words += (
                    f", {len(campaign.faults)} faults, servers broken: {len(self._door.broken)}, "
                    f"{self._samples[-1] if self._samples else ''}"
                )
                print(words, file=sys.stderr, flush=True)

    def growth(self) -> dict[str, dict[str, float]]:
        """Of each quantity the median of the second fifth of the run (the first is warm-up) and of the last, and their
        ratio less 1.
        """
        fifth = max(1, len(self._samples) // 5)
        rows = {}
        for name in self._samples[0] if self._samples else ():
            values = [sample[name] for sample in self._samples]
            early, late = statistics.median(values[fifth : 2 * fifth] or values), statistics.median(values[-fifth:])
            rows[name] = {"early": early, "late": late, "growth": round(late / early - 1, 4) if early else 0.0}
        return rows
