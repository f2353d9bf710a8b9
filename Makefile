# SPDX-License-Identifier: Apache-2.0
# make demo     the demonstration: three silos and an aggregator on this machine, in the folder demo/ (made anew each time)
# make test     the tests, two at a time
# make lint     ruff and mypy
# make bench    the benchmarks, some five minutes; each has options for longer (python -m benchmarks.round --help)
# make mutants  takes every check of the protocol's modules out, one at a time: does a test notice? (docs/guides/checks.md)
# make fuzz     ten minutes of broken input for every parser; installs the extra [fuzz] first where it is missing
# make clean    removes .venv, caches and the demonstration's folder
# Each makes .venv first where it is missing, or where pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
# The CPU build of torch is a tenth of the default one. pip goes on without this index where it cannot be reached.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
export OMP_NUM_THREADS ?= 1
BENCHMARKS := noise step_overhead round

# The size at which its targets are set; all sizes take much longer. The peer it can be compared with is not needed.
SECURE_SUM := --silos 3 8 --dimensions 917504 --repeats 3

.PHONY: demo test lint bench mutants fuzz clean
.DELETE_ON_ERROR:

demo: $(READY)
	rm -rf demo
	$(VENV)/bin/aggregator simulate --home demo

# Hundreds of processes start in these tests: each would compile the project anew where bytecode is not written.
test: export PYTHONDONTWRITEBYTECODE =
test: $(READY)
	$(VENV)/bin/python -m pytest -n 2

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

bench: $(READY)
	@set -e; for name in $(BENCHMARKS); do echo "== benchmarks/$$name.py"; $(VENV)/bin/python -m "benchmarks.$$name"; echo; done
	@echo "== benchmarks/secure_sum.py"; $(VENV)/bin/python -m benchmarks.secure_sum $(SECURE_SUM)

mutants: $(READY)
	$(VENV)/bin/python -m tests.mutation

fuzz: $(READY)
	$(VENV)/bin/python -c 'import atheris' 2>/dev/null || $(VENV)/bin/pip install --quiet -c constraints.txt -e '.[fuzz]'
	$(VENV)/bin/python -m tests.fuzz all --seconds 600

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is missing or older than Python 3.11"; echo; echo "hint: make $(firstword $(MAKECMDGOALS)) PYTHON=python3.11"; exit 3; } >&2
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --retries 0 --extra-index-url $(TORCH_INDEX) -c constraints.txt torch
	$(VENV)/bin/pip install --quiet -c constraints.txt -e '.[silo,demo,test]'
	touch $@
