# Two commands do everything on a machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-oldest faults cluster docs coverage install lint clean

demo: install
	$(BIN)/zscl demo --out runs/demo

# A process a core: starting Ray's processes leaves one idle half of the time. A file's tests stay together, since they
# share runs; files are taken in the order of their names, which has those through Ray first and no long one last.
test: lint docs
	$(BIN)/python -m pytest -m "not slow and not faults" -n 2 --dist loadfile --no-loadscope-reorder

faults: install
	$(BIN)/python -m pytest -m "(faults or fault) and not slow" -n 2 --dist loadfile --no-loadscope-reorder

# Real clusters of this machine's own: a job submitted, stopped and submitted again; two hosts that share nothing (root).
cluster: install
	tests/cluster/submit.sh
	tests/cluster/hosts.sh

test-slow: install
	$(BIN)/python -m pytest -m slow

# With the oldest versions that are allowed, in an environment of its own.
test-oldest:
	$(MAKE) install VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt
	.venv-oldest/bin/python -m pytest -m "not slow and not faults" -n 2 --dist loadfile

# The documents as a site in build/site; fails at a broken link, and where a reference page is not as its sources make it.
docs: install
	$(BIN)/python docs/reference.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Lines of schemas/ and zscl/ that the tests run, without those that start Ray's own processes.
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
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test]'
	@# Outside judges, for the halves of them that need nothing we lack; what their other halves need is a hundred
	@# megabytes, and would double the time that open_clip takes to import.
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --no-deps clip-benchmark continuum
	@touch $@

clean:
	rm -rf .venv .venv-oldest build dist *.egg-info .mypy_cache .import_linter_cache .ruff_cache .pytest_cache
