# Everything runs in .venv, which is made when it is missing or pyproject.toml has changed.
PYTHON ?= python3
PRECISION ?= 32-true
WORKERS ?= 2
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lint bench checkpoints environment clean

demo: environment  ## train, attack and report on the embedded digits
	$(BIN)/python -m lit_adv.experiments.demo

test: environment  ## all tests, on WORKERS processes of one thread each
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -q

lint: environment  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: environment  ## attacks against the bare forward, training against a bare loop, start-up
	$(BIN)/python benchmarks/run.py

checkpoints: environment  ## train the reference targets, resumably
	$(BIN)/python -m lit_adv.experiments.references --precision $(PRECISION)

environment: .venv/ready

.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache runs
