"""A short campaign with a fixed seed; long ones, also through a real server, are run by hand (campaign.py)."""

from __future__ import annotations

import pytest

from tests.chaos.campaign import run_campaign
from tests.chaos.front_end_kills import run_kills
from tests.chaos.server_kills import MOMENTS
from tests.chaos.server_kills import run_kills as run_server_kills
from tests.chaos.workers import Plan

pytestmark = [pytest.mark.server, pytest.mark.slow]


RANKS = pytest.mark.parametrize("ranks", [1, 2], ids=lambda ranks: f"{ranks} ranks" if ranks > 1 else "one rank")


@pytest.mark.long
@RANKS
def test_no_answer_is_wrong_lost_or_ended_twice_while_the_engine_is_killed_and_runs_out_of_everything(
    ranks: int,
) -> None:
    plan = Plan(
        door="front-end",
        seconds=0,
        requests=150,
        kills=3,
        most_kills=6,
        seed=3,
        workers=24,
        kill_every=1.5,
        out_of_memory=0.002,
        ranks=ranks,
    )
    report, faults = run_campaign(plan)
    print(report)
    assert not faults, faults[0]
    assert report["outcomes"]["whole"] > 30
    assert report["mishaps"]["refused_pages"] > 0


@pytest.mark.long
@RANKS
def test_no_answer_of_the_living_is_lost_while_front_ends_engines_standbys_and_grammar_processes_are_killed(
    ranks: int,
) -> None:
    report, faults = run_kills(kills=5, seconds=120, seed=1, count=4, ranks=ranks)
    print(report)
    assert not faults, faults[0]
    assert report["front ends killed"] >= 5
    assert report["answers of survivors"] > 5
    assert (report["pages held for the dead"], report["processes left"], report["files left"]) == (0, 0, 0)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_nothing_of_a_server_that_is_killed_at_any_moment_stays() -> None:
    report, faults = run_server_kills(kills=56, seconds=1500, seed=1, engine="fake")
    print(report)
    assert not faults, faults[0]
    assert all(report[moment] >= 5 for moment in MOMENTS)
