"""Compiles the modules of each package that pip has unpacked, until the command `paged` is there, which comes last:
`python3 compile_installed.py VENV`.
"""

from __future__ import annotations

import compileall
import sys
import time
from pathlib import Path


def compile_installed(venv: Path) -> None:
    seen: set[Path] = set()
    complete = False
    while not complete and venv.parent.exists():
        complete = (venv / "bin" / "paged").exists()
        for installer in venv.glob("lib/python3.*/site-packages/*.dist-info/INSTALLER"):  # written after all modules
            if installer not in seen:
                seen.add(installer)
                for line in installer.with_name("RECORD").read_text().splitlines():
                    if (name := line.partition(",")[0]).endswith(".py"):
                        compileall.compile_file(installer.parents[1] / name, quiet=2)
        time.sleep(0.5)


if __name__ == "__main__":
    compile_installed(Path(sys.argv[1]))
