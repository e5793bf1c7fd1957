"""A short campaign with a fixed seed; long ones, also through a real server, are run by hand (campaign.py)."""

from __future__ import annotations

import pytest

from tests.chaos.campaign import Plan, run_campaign

pytestmark = [pytest.mark.server, pytest.mark.slow]


def test_no_answer_is_wrong_lost_or_ended_twice_while_the_engine_is_killed_and_runs_out_of_everything() -> None:
    plan = Plan(door="front-end", seconds=0, requests=150, kills=3, most_kills=6, seed=3, workers=24, kill_every=1.5, out_of_memory=0.002)
    report, faults = run_campaign(plan)
    print(report)
    assert not faults, faults[0]
    assert report["outcomes"]["whole"] > 30
    assert report["mishaps"]["refused_pages"] > 0
