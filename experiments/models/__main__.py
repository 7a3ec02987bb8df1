"""python -m experiments.models [--json FILE] [--page FILE] [--only NAME]."""

import argparse
import json
from pathlib import Path

import lycheedecode.engine
import lycheedecode.integrations.transformers  # noqa: F401  once, before processes are forked

from .sweep import sweep

parser = argparse.ArgumentParser(prog="python -m experiments.models")
parser.add_argument("--only", action="append", default=[])
parser.add_argument("--json", type=Path)
options = parser.parse_args()
rows = []
for row in sweep(options.only):
    rows.append(row.to_dict())
    h, e = row.hybrid, row.engine
    print(f"{row.architecture:36} {h.outcome:9} {e.outcome:9} {h.why} | {e.why if e.why != h.why else ''}", flush=True)
if options.json:
    options.json.write_text(json.dumps(rows, indent=1) + "\n")
