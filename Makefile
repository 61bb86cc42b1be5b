# make demo   a judged, packaged toxicity patch for a real model        make test   fast tests, sets itself up
# make lint   ruff + mypy        make check   lint, every test, make audit        make bench   speed, to a JSON
# make audit  known vulnerabilities of the pinned packages, where pypi.org can be reached
# make test-slurm   sweeps on a SLURM of this machine alone (root, and the packages slurm-wlm and munge; skips without)
# make engines   builds llama.cpp for the slow tests that need it (they skip, and say so, without)
#
# A GPU: make demo TORCH='torch==2.13.0 --index-url URL' with the index of the build that fits your driver, and
# ARGS='trainer=gpu'. Anything after ARGS goes to run.py: make demo ARGS='patch.length=10 seed=1'

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# One mark for each choice of torch, so that another choice installs.
READY := $(VENV)/.ready-$(firstword $(shell printf %s "$(TORCH)" | cksum))
ARGS ?=

.PHONY: demo test lint audit check bench slow test-slurm engines clean

demo: $(READY)
	$(BIN)/python run.py name=demo $(ARGS)

# A process for each core, at most four: one imports torch, and a tiny model leaves a second thread nothing to do.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal

slow: $(READY)
	$(BIN)/pytest -m slow

test-slurm: $(READY)
	$(BIN)/pytest -m slurm -rs tests/slurm

# llama.cpp, so that the slow tests can serve a patch with an engine that knows nothing of patches.
engines: $(READY)
	$(BIN)/python -m pip install --quiet -c requirements.lock -e '.[engines]'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test slow audit

# Known vulnerabilities of the packages that are pinned. A mirror of the registry need not tell any, and pip-audit would
# find none: an old version that has some is asked for first.
KNOWN := import json, urllib.request as u; json.load(u.urlopen("https://pypi.org/pypi/jinja2/2.10/json", timeout=10))["vulnerabilities"][0]
audit: $(READY)
	@if $(BIN)/python -c '$(KNOWN)' 2>/dev/null; then \
	  $(BIN)/python -m pip install --quiet -c requirements.lock pip-audit && \
	  $(BIN)/python -m pip_audit --strict --requirement requirements.lock --no-deps --disable-pip; \
	else echo "audit: pypi.org's list of vulnerabilities cannot be reached: not looked up"; fi

# torch first and by itself: left to the other packages' requirements, pip would take the registry's newest build.
$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"policypatch needs Python 3.11 to 3.13, not {v[0]}.{v[1]}: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -c requirements.lock -e '.[judges,sweeps,serve,bench,dev]'
	touch $@

bench: $(READY)
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) *.egg-info
