"""Short campaigns with fixed seeds; long ones are run by hand (campaign.py)."""

from __future__ import annotations

import pytest

from tests.chaos.campaign import Plan, run_campaign

pytestmark = [pytest.mark.server, pytest.mark.slow]


def test_no_answer_is_wrong_lost_or_ended_twice_while_the_engine_is_killed_and_runs_out_of_everything() -> None:
    report, faults = run_campaign(Plan(door="front-end", seconds=0, requests=250, kills=3, seed=3, workers=24, kill_every=1.5, out_of_memory=0.002))
    print(report)
    assert not faults, faults[0]
    assert report["outcomes"]["whole"] > 50
    assert report["mishaps"]["refused_pages"] > 0


def test_nor_through_a_real_server() -> None:
    """Nobody leaves: what a server of 2.51.0 makes of that is for campaigns by hand."""
    report, faults = run_campaign(Plan(door="server", seconds=0, requests=150, kills=1, seed=4, workers=16, kill_every=3, leave=False))
    print(report)
    assert not faults, faults[0]
    assert not report["server_broken"]
    assert report["outcomes"]["whole"] > 20
