"""python -m experiments.models_sweep [--json FILE] [--page FILE] [--only NAME]."""

import argparse
import json
import sys
from pathlib import Path

import transformers

import lycheedecode.engine
import lycheedecode.integrations.transformers  # noqa: F401  once, before processes are forked

from .page import page
from .sweep import Row, sweep


def _line(row: Row) -> str:
    whys = dict.fromkeys(outcome.why for outcome in (row.hybrid, row.engine) if outcome.why)
    return f"{row.architecture:36} {row.hybrid.outcome:9} {row.engine.outcome:9} {' | '.join(whys)}"


def main() -> int:
    """Exit status: 1 where a class is neither exact nor refused."""
    parser = argparse.ArgumentParser(prog="python -m experiments.models_sweep", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows")
    parser.add_argument("--page", type=Path, help="write the page for documents")
    parser.add_argument("--only", action="append", default=[], help="a class or model type; may be given again")
    options = parser.parse_args()
    rows = []
    for row in sweep(options.only):
        rows.append(row)
        print(_line(row), flush=True)
        if options.json:  # after every row: a sweep takes minutes
            found = {"transformers": transformers.__version__, "rows": [one.to_dict() for one in rows]}
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.page:
        options.page.write_text(page(rows, transformers.__version__), encoding="utf-8")
    wrong = [row.architecture for row in rows if not row.is_right]
    print(f"{len(rows)} classes, {len(wrong)} neither exact nor refused {wrong or ''}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
