#!/usr/bin/env bash
# Software: math-verify 0.9.0 with its antlr4 parser, on ordinary answers to mathematical problems.
# One would guess: a thin space groups digits; a list keeps how often a member occurs; a subscript names a base.
# What happens: 1\,234 is read as 235 (1 and 234 are added), the list 2,2,3 is taken for 2,3,3, and 17_8 for 17_9; so a
#   wrong answer is graded as right.
# Exit status: 0 while that is so, 1 when it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet 'math-verify[antlr4_13_2]==0.9.0'
cat > "$folder/show.py" <<'PYTHON'
import sys

from math_verify import parse, verify

thin = parse(r"$1\,234$")
print(rf"1\,234 is read as {thin[0]}")
pairs = [("2,2,3", "2,3,3"), ("17_8", "17_9")]
graded = [verify(parse(f"${gold}$"), parse(f"${answer}$")) for gold, answer in pairs]
for (gold, answer), right in zip(pairs, graded):
    print(f"{answer} for {gold}: {'right' if right else 'wrong'}")
same = str(thin[0]) == "235" and all(graded)
print("as described" if same else "this has changed")
sys.exit(0 if same else 1)
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
