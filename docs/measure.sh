#!/usr/bin/env bash
# Makes the result files of docs/results anew: docs/measure.sh FOLDER STAGE...
# Stages up to `serving` want one GPU to themselves, `ranks` and `spread` two; `cpu` wants a quiet machine. Each says how
# long it took.
set -euo pipefail
out=$1
shift
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
mkdir -p "$out"
gpu=${GPU:-h200} # in the names of result files

python() { command "${PYTHON:-python3}" "$@"; }
lychee() { python -m lycheedecode "$@"; }
bench() { python -m "lycheedecode.bench.$1" "${@:2}"; }

# What the plan that ships is judged on: budget 512, blocks of 16.
fidelity=(evaluate fidelity --dtype float32 --block-size 16)
budget=(--budget-tokens 512)

stage_tests() { # kernels and compiled steps against the reference, and no stray access
  python -m pytest -q -n 12 tests/ops tests/engine tests/fusion tests/policies tests/bench
  compute-sanitizer --tool memcheck --error-exitcode 1 "${PYTHON:-python3}" -m lycheedecode.bench.ops --smoke
}

stage_ops() { bench ops --batches 1 8 --contexts 131072 --blocks 16 32 64 --json "$out/$gpu-ops.json"; }

stage_linear() { bench linear --step --json "$out/$gpu-linear.json"; }

stage_step() { # 4 x 524288 does not fit, and is left out
  bench step --batches 1 4 --contexts 32768 131072 524288 --profile --json "$out/$gpu-step-llama-3-8b.json" \
    --forms full hybrid paper hybrid+float8 hybrid+refresh2
  bench step --model qwen3-8b --batches 1 4 --profile --json "$out/$gpu-step-qwen3-8b.json"
  bench step --layers 8 --contexts 1048576 --json "$out/$gpu-step-1m.json"
}

stage_generate() { bench generate --json "$out/$gpu-generate.json"; }

stage_plan() { # the plan that ships, and one by the paper's own identification, for a model of 8K positions
  lychee identify "$out/plans/smollm2-135m.json" --num-retrieval-heads 14 --dtype float32 \
    --json "$out/identify-smollm2-135m.json"
  lychee identify "$out/plans/paper.json" --preset paper --num-retrieval-heads 14 --dtype float32 --steps 1500 \
    --train prose:1024:passkey:10 --train prose:2048:passkey:10 --train prose:4096:passkey:10 \
    --json "$out/identify-paper.json"
}

stage_fidelity() { # the shipped plan and its controls, and what cuts the scan's bytes further
  lychee "${fidelity[@]}" "${budget[@]}" --prompts 100 --batch-size 50 --json "$out/fidelity.json" \
    --policies hybrid,hybrid+float8,hybrid+refresh2,paper,same-index,random:0,random:1,random:2,own-topk
}

equal=(--match-bytes --policies hybrid,paper,same-index,kascade,tidaldecode,quest,duo,streaming)

stage_peers() { # every peer at hybrid's bytes
  lychee "${fidelity[@]}" "${budget[@]}" "${equal[@]}" --prompts 100 --batch-size 50 --json "$out/peers.json"
}

stage_budgets() { # the same, from smaller budgets to larger ones
  lychee "${fidelity[@]}" --budgets 128,256,1024 "${equal[@]}" --prompts 100 --batch-size 50 \
    --cells noise:4096:passkey:1 --cells prose:4096:passkey:1 --json "$out/peers-by-budget.json"
}

stage_paper() { # after `plan`: the paper's form with roles and donors of its own identification
  lychee "${fidelity[@]}" "${budget[@]}" --plan "$out/plans/paper.json" --policies hybrid,paper --prompts 100 \
    --batch-size 50 --json "$out/peers-paper-roles.json"
}

stage_long() {
  lychee "${fidelity[@]}" "${budget[@]}" --prompts 16 --batch-size 16 --cells prose:2048:long:1536 --temperature 0.7 \
    --policies hybrid,hybrid+correction,full+correction --json "$out/long.json"
}

stage_roles() { # ways to identify; how stable roles are; budgets by numbers of retrieval heads
  python -m experiments.identification --json "$out/identification.json"
  python -m experiments.stability --json "$out/stability.json" --plans "$out/plans"
  local plans=()
  for plan in "$out"/plans/{seed-0,*-retrieval-heads}.json; do plans+=(--plan "$plan"); done
  lychee "${fidelity[@]}" --prompts 32 --batch-size 16 --policies hybrid --budgets 128,256,512,1024 "${plans[@]}" \
    --cells noise:4096:passkey:1 --cells prose:4096:passkey:5 --json "$out/heads-by-budget.json"
}

stage_tasks() { # a model of 8K positions: longer items are skipped, and say so
  local ruler=(evaluate tasks --tasks ruler_synthetic --limit 100 --batch-size 100 --execution graph --block-size 16)
  lychee "${ruler[@]}" --lengths 4096 --policies hybrid --budgets 256,512,1024 --json "$out/ruler.json"
  ruler+=(--tasks niah_single_1,niah_single_2,niah_multikey_1) # full attention solves about half of each, or more
  lychee "${ruler[@]}" --lengths 4096 --budgets 128,256,512,1024 --match-bytes 4000 \
    --policies hybrid,paper,quest,tidaldecode,duo,kascade,streaming --json "$out/ruler-equal-bytes.json"
  lychee "${ruler[@]}" --lengths 2048,8000 --batch-size 50 --policies hybrid --budgets 256,512,1024 \
    --json "$out/ruler-lengths.json"
}

stage_serving() {
  local cases=(1x1024 1x32768 1x131072 4x131072)
  for model in llama-3-8b qwen3-8b; do
    bench serving --model $model --cases "${cases[@]}" --fill --json "$out/$gpu-serving-$model.json"
  done
}

stage_ranks() { # two GPUs of one host; cases up to what one of 80 GB holds, and beyond
  local cases=(1x32768 4x32768 8x32768 1x131072 3x131072) two=(--tensor-parallel-size 2)
  python -m experiments.ranks "${two[@]}" --json "$out/${gpu}x2-ranks.json"
  bench serving --fill --cases "${cases[@]}" --json "$out/${gpu}x2-serving-1-rank.json"
  bench serving --fill --cases "${cases[@]}" 4x131072 "${two[@]}" --json "$out/${gpu}x2-serving-2-ranks.json"
  bench serving --fill --cases "${cases[@]}" 4x131072 "${two[@]}" --model llama-3-70b --layers 24 \
    --json "$out/${gpu}x2-serving-70b.json"
}

stage_spread() { # identification with the model on one GPU and on two
  for map in "" "--device-map balanced"; do
    lychee identify "$out/plans/gpus${map:+-2}.json" --num-retrieval-heads 14 --dtype float32 --calibrate-prompts 32 $map \
      --json "$out/${gpu}x2-identify${map:+-2}.json"
  done
}

stage_cpu() {
  bench generate --model smollm2-135m --contexts 7000 --tokens 64 --budget 512 --block 16 --json "$out/cpu-generate.json"
  lychee "${fidelity[@]}" "${budget[@]}" --prompts 100 --batch-size 10 --json "$out/fidelity-2k-cpu.json" \
    --cells noise:2048:passkey:1 --cells prose:2048:passkey:1 \
    --policies hybrid,hybrid+float8,hybrid+refresh2,paper,same-index,random:0,own-topk
  lychee "${fidelity[@]}" --policies hybrid,quest --budgets 512,1232 --prompts 12 --batch-size 6 \
    --cells prose:4096:passkey:1 --cells noise:4096:passkey:1 --json "$out/quest-twice-the-bytes-cpu.json"
}

for stage in "$@"; do
  declare -F "stage_$stage" >/dev/null || { echo "measure.sh: there is no stage $stage" >&2; exit 2; }
  began=$SECONDS
  "stage_$stage"
  echo "measure.sh: $stage took $((SECONDS - began)) s" >&2
done
