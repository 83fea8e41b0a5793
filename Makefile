# `make demo` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-oldest faults cluster docs coverage install lint clean

demo: install
	$(BIN)/zscl demo --out runs/demo

# One pytest process per core. The tests of a file stay in one process, because they share runs.
test: install
	$(MAKE) -j2 --output-sync lint docs
	$(BIN)/python -m pytest -m "not slow and not faults" -n 2 --dist loadfile --no-loadscope-reorder

faults: install
	$(BIN)/python -m pytest -m "(faults or fault) and not slow" -n 2 --dist loadfile --no-loadscope-reorder

# Real clusters on this machine: a job is submitted, stopped and resubmitted; two hosts without a shared folder (needs root).
cluster: install
	tests/cluster/submit.sh
	tests/cluster/hosts.sh

test-slow: install
	$(BIN)/python -m pytest -m slow

# With the oldest allowed versions, in a separate environment.
test-oldest:
	$(MAKE) install VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt
	.venv-oldest/bin/python -m pytest -m "not slow and not faults" -n 2 --dist loadfile

# The documents as a site in build/site. Fails for broken links and for reference pages that differ from their sources.
docs: install
	$(BIN)/python docs/reference.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Line coverage of schemas/ and zscl/, without the tests that start Ray.
coverage: install
	$(BIN)/python -m pytest tests/schemas tests/zscl -m "not slow and not faults" -n 2 --dist loadfile --cov --cov-report term:skip-covered

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: found Python %d.%d, expected 3.11 or newer; try make PYTHON=python3.11 $(MAKECMDGOALS)" % sys.version_info[:2])'
	@echo "installing into $(VENV): about 3 minutes, 7 GB with torch's CUDA build"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint $(CONSTRAINTS) --editable '.[test]'
	@# Two packages that check our results. Their other dependencies are not needed and would slow open_clip's import.
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --no-deps clip-benchmark continuum
	@touch $@

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info .mypy_cache .import_linter_cache .ruff_cache .pytest_cache
