"""A short campaign with a fixed seed; long ones are run by hand (campaign.py)."""

from __future__ import annotations

import pytest

from tests.chaos.campaign import run_campaign

pytestmark = [pytest.mark.server, pytest.mark.slow]


def test_no_answer_is_wrong_lost_or_ended_twice_while_the_engine_is_killed() -> None:
    report, faults = run_campaign(seconds=20, seed=3, workers=24, kill_every=6.0, instances=2)
    print(report)
    assert not faults, faults[0]
    assert report["requests"] > 50
