#!/usr/bin/env bash
# Serve a model with hybrid attention in vLLM, and ask it something.
# Run: examples/serve_and_ask.sh path/to/model my-plan.json
set -euo pipefail
model=$1
plan=$2
port=${PORT:-8000}

vllm serve "$model" --port "$port" --attention-backend CUSTOM \
  --additional-config "{\"lycheedecode\": {\"plan\": \"$plan\", \"budget_tokens\": ${BUDGET_TOKENS:-4096}}}" &
server=$!
trap 'kill $server' EXIT
until curl --silent --fail "http://localhost:$port/health"; do
  kill -0 $server # stop waiting when the server is gone
  sleep 1
done
curl --silent "http://localhost:$port/v1/completions" --header 'Content-Type: application/json' \
  --data "{\"model\": \"$model\", \"prompt\": \"The capital of France is\", \"max_tokens\": 16}"
