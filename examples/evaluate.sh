#!/usr/bin/env bash
# How faithful is a plan? KL divergence to full attention on fresh prompts, beside other ways to choose.
# Run: examples/evaluate.sh path/to/model my-plan.json
set -euo pipefail
lycheedecode evaluate fidelity --model "$1" --plan "$2" --budget-tokens "${BUDGET_TOKENS:-512}" --block-size 16 \
  --cells "${CELL:-prose:2048:continuation:64}" --prompts "${PROMPTS:-8}" --policies hybrid,own-topk,streaming --json fidelity.json
