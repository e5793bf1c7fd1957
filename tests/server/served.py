"""A real server for tests that look at its answers, not at how it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from paged_backend.server.launch import Server, ServerSettings


@contextmanager
def served(settings: ServerSettings) -> Iterator[Server]:
    """Killed at the end: a stop takes three seconds with one front end and six with four, most of them Triton Server's
    naps. How servers stop is tested in test_serve_command.py, test_clean_exits.py and test_drain.py.

    No engine stands by unless `settings` says so: it would import torch beside the tests, for nobody who dies.
    """
    server = Server(replace(settings, options={"standby_engine": False, **settings.options}))
    server.start()
    try:
        yield server
    finally:
        server.kill()
        server.stop()  # removes what a kill leaves
