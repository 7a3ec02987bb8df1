#!/usr/bin/env bash
# Software: datasets 5.2.0 with dill 0.4.1 and pyarrow 26.0.1, in a folder on PYTHONPATH (`pip install --target`).
# Input: Dataset.from_list([{"a": 1}])
# One would guess: what it does in a virtual environment, a data set of one row.
# What happens: PicklingError (MonthDayNano is not found as builtins.MonthDayNano). The data set hashes its table with dill
#   through a local function that names the module pyarrow, and dill writes a module out by value unless its path begins
#   with sys.prefix or contains "site-packages".
# Exit status: 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/show.py" <<'PYTHON'
import pickle
import sys

from datasets import Dataset

try:
    print(Dataset.from_list([{"a": 1}]))
except pickle.PicklingError as error:
    print(error)
    print("as described")
    sys.exit(0)
print("this has changed")
sys.exit(1)
PYTHON
python3 -m pip install --quiet --target "$folder/packages" datasets==5.2.0 dill==0.4.1 pyarrow==26.0.1
PYTHONPATH="$folder/packages" python3 "$folder/show.py"
