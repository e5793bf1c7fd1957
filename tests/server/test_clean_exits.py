"""Processes of Triton Server's that a stop or an unload ends must end well: a crash at exit is a line in the kernel's
log, and a core dump.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.server.front_end_server import serving

pytestmark = pytest.mark.server


def test_stubs_end_with_status_0_after_an_unload_and_after_a_stop(tmp_path: Path) -> None:
    exits = tmp_path / "exits"
    with serving(tmp_path / "server", stub_exits=exits) as server:
        assert server.ask("tokens=3").error is None
        server.wait_for('paged_requests_finished_total{reason="length"}', 1)
        server.unload()
        deadline = time.monotonic() + 10
        while not exits.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server.load()
        assert server.ask("tokens=3").error is None
        server.process.terminate()
        assert server.process.wait(30) == 0
    assert exits.read_text().split() == ["0", "0"]


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_fifty_starts_and_stops_leave_no_line_of_a_crash_in_the_kernels_log(tmp_path: Path) -> None:
    """PAGED_STOPS: how many instead."""
    if subprocess.run(["dmesg"], capture_output=True, check=False).returncode != 0:
        pytest.skip("the kernel's log cannot be read here")
    stubs: set[int] = set()
    for number in range(int(os.environ.get("PAGED_STOPS", "50"))):
        with serving(tmp_path / str(number), instances=4) as server:
            assert server.ask("tokens=3").error is None
            stubs |= server.stub_pids()
            server.process.terminate()
            assert server.process.wait(40) == 0
        assert not list((tmp_path / str(number)).glob("core*"))
    crashed = re.findall(
        r"triton_python_b\w*\[(\d+)\]: segfault",
        subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout,
    )
    assert not stubs & set(map(int, crashed))
