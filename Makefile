# `make run` plays the main job, `make test` runs the tests, `make ui` opens MLflow; each sets up what it needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SOURCES = $(shell find clstream strategies streams experiments -name '*.py' -o -name '*.yaml') setup.cfg setup.py

.PHONY: run test test-all gpu cluster ui check bench clean

run: $(VENV)/installed
	$(BIN)/clstream compare experiments/digits_finetune.yaml experiments/digits_replay.yaml --seeds 0,1,2
	@echo "(or: make ui)"

# A process for each core, up to 4: each holds its own torch, of one thread.
test: $(VENV)/tested
	$(BIN)/pytest -n logical --maxprocesses 4 --dist worksteal -m "not slow"

# Those that take a second and more too: processes that are killed, workers, servers, the contract of all strategies.
test-all: test
	$(BIN)/pytest -n logical --maxprocesses 4 --dist worksteal -m slow

# Where there is a GPU: from the source tree, with any Python that has torch and pytest.
gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m pytest -m gpu tests/gpu
	PYTHONPATH=. $(or $(wildcard $(BIN)/python),$(PYTHON)) experiments/bench_methods.py --device cuda --turns 2 --only "by hand"

# Real clusters of Ray and Dask on this machine, and MLflow on PostgreSQL, if that is installed.
cluster: $(VENV)/tested
	$(BIN)/python -m pip install --quiet '.[cluster]'
	$(BIN)/pytest tests/cluster

ui: $(VENV)/installed
	$(BIN)/clstream ui

check: $(VENV)/checked
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(VENV) && bin/mypy --strict --config-file ../setup.cfg -p clstream

bench: $(VENV)/installed
	$(BIN)/python experiments/bench_methods.py --busy --out bench --track
	$(BIN)/python experiments/bench_engine.py
	$(BIN)/python experiments/bench_evaluation.py
	$(BIN)/python experiments/bench_large.py

# The package itself is installed, not linked: what is tested is what ships.
$(VENV)/installed: $(SOURCES) | $(BIN)/python
	rm -rf build
	$(BIN)/python -m pip install --quiet .
	touch $@

$(VENV)/tested: $(VENV)/installed
	$(BIN)/python -m pip install --quiet '.[test]'
	touch $@

$(VENV)/checked: $(VENV)/tested
	$(BIN)/python -m pip install --quiet '.[dev]'
	touch $@

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "clstream needs Python 3.10 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
