# SPDX-License-Identifier: Apache-2.0
# make demo   the demonstration: three silos and an aggregator on this machine, in the folder demo/ (made anew each time)
# make test   the tests, two at a time
# make lint   ruff and mypy
# make bench  the benchmarks, some five minutes; each has options for longer (python -m benchmarks.round --help)
# make clean  removes .venv, caches and the demonstration's folder
# Each makes .venv first where it is missing, or where pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
# The CPU build of torch is a tenth of the default one. pip goes on without this index where it cannot be reached.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
export OMP_NUM_THREADS ?= 1
BENCHMARKS := noise step_overhead round

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

demo: $(READY)
	rm -rf demo
	$(VENV)/bin/aggregator simulate --home demo

test: $(READY)
	$(VENV)/bin/python -m pytest -n 2

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

bench: $(READY)
	@set -e; for name in $(BENCHMARKS); do echo "== benchmarks/$$name.py"; $(VENV)/bin/python -m "benchmarks.$$name"; echo; done

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
