# Needs Python >= 3.11 and make; everything else goes into .venv, which a second call reuses.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test check format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     convert, train, search and report on generated scenes (runs/demo/report.html)"
	@echo "make test     the test suite"
	@echo "make check    format, lint, types, layers"
	@echo "make format   mend what ruff can mend"
	@echo "make clean    remove .venv and caches; runs/ stays"

demo: $(READY)
	$(BIN)/messnet run configs/demo.yaml

# Two processes of one thread each: half the time of one process of two threads.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache src/*.egg-info

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed --editable ".[dev]"
	touch $@
