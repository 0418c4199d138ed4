# Needs Python >= 3.11 and make; everything else goes into .venv, which a second call reuses.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Made when that extra is installed: dev holds train.
TRAIN := $(VENV)/.train
DEV := $(VENV)/.dev
DOCS := $(VENV)/.docs
# Tests of the page in a browser take it from here; without npm they are skipped.
BROWSER_RUNTIME := $(VENV)/node_modules/onnxruntime-web

# Threads of libgomp, which torch computes with, soon sleep when they wait: see src/messnet/costs/processor.py.
ifndef OMP_WAIT_POLICY
export GOMP_SPINCOUNT ?= 1000
endif

.PHONY: help demo test check docs format clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     convert, train, search and report on generated scenes (runs/demo/report.html)"
	@echo "make test     the test suite"
	@echo "make check    format, lint, types, layers"
	@echo "make docs     the documentation as a site (build/site/index.html)"
	@echo "make format   mend what ruff can mend"
	@echo "make clean    remove .venv and caches; runs/ stays"

demo: $(TRAIN)
	$(BIN)/messnet run configs/demo.yaml

# Two processes of one thread each: half the time of one process of two threads. When one dies its test fails and the
# rest of its tests are left out; started anew it would get the same file again, and the run would never end. Files in
# their own order: sorted by their number of tests, those of few long ones would come last and leave a process idle.
test: $(DEV) $(BROWSER_RUNTIME)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Warnings are errors: a link or a cross-reference that leads nowhere.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(DEV)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache src/*.egg-info

$(TRAIN) $(DEV) $(DOCS): $(VENV)/.%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed --editable ".[$*]"
	touch $@

$(BROWSER_RUNTIME):
	-npm install --silent --fetch-retries 0 --no-package-lock --prefix $(VENV) onnxruntime-web
