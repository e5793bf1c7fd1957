"""`paged models`: what can be served."""

from __future__ import annotations

import json
import subprocess
import sys

import typer
from rich.console import Console
from rich.table import Table

_SECONDS = 120


def models() -> None:
    """List the architectures and formats of checkpoints that can be served.

    `architectures` in a checkpoint's config.json says which one it is of.
    """
    asked = subprocess.run(
        [sys.executable, "-P", "-m", "paged_backend.models.table"],
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    if asked.returncode:
        print(
            f"paged: error: the list of families cannot be read: {asked.stderr.strip().splitlines()[-1:]}",
            file=sys.stderr,
        )
        raise typer.Exit(1)
    listed = json.loads(asked.stdout)
    table = Table("architecture", "models", box=None, pad_edge=False)
    for family in listed["families"]:
        table.add_row(family["architecture"], family["models"])
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"\nWeights in bfloat16, float16 or float32, or quantised (quant_method): {', '.join(listed['formats'])}.",
        soft_wrap=True,
    )
