# Every target sets up what it needs, once; a change of pyproject.toml or constraints.txt sets it up anew.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export MMFM_DATA ?= ../shared/data
SOURCES := pyproject.toml constraints.txt

.PHONY: demo test e2e e2e-plain lint bench clean
demo: $(VENV)/.base                  ## four generated hospitals, from nothing to a report
	$(BIN)/mmfm demo-data runs/demo-data
	$(BIN)/mmfm simulate deploy/federations/demo.yaml --run runs/demo --replace

test: $(VENV)/.dev                   ## every test, on every core
	$(BIN)/pytest -n auto

e2e: $(VENV)/.dev                    ## coordinator and four sites in network namespaces, and every fault: hours, as root, needs nginx
	$(BIN)/python -u tests/e2e/faults.py

e2e-plain: $(VENV)/.dev              ## of these only the one without a fault: minutes; says so where it cannot run
	$(BIN)/python -u tests/e2e/faults.py --or-skip plain

lint: $(VENV)/.dev                   ## format, rules, types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

bench: $(VENV)/.dev                  ## how fast it is, against a bare loop; fails where that got worse: minutes
	$(BIN)/python benchmarks/speed

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(VENV)/bin/pip $(SOURCES)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev: $(VENV)/bin/pip $(SOURCES)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.base

clean:                               ## remove the environment and generated files, never runs
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
