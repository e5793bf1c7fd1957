from __future__ import annotations


def main() -> None:
    raise SystemExit("paged: error: not built yet")
