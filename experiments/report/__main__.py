"""`python -m experiments.report FOLDER`: FOLDER/*.json -> FOLDER.md, with its pictures in FOLDER.

The README two folders up gets its small table, if it has a place for it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from experiments.report import draw, front_table, render


def main() -> None:
    """Write document and pictures."""
    parser = argparse.ArgumentParser(prog="experiments.report", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the result files are")
    folder = parser.parse_args().folder
    if not folder.is_dir():
        parser.error(f"there is no folder {str(folder)!r}.")
    pictures = draw(folder)
    target = folder.with_suffix(".md")
    target.write_text(render(folder), encoding="utf-8")
    front_table.write(folder.resolve().parents[1] / "README.md", folder)
    print(f"{target}: {len(list(folder.glob('*.json')))} result files, {len(pictures)} pictures", file=sys.stderr)


if __name__ == "__main__":
    main()
