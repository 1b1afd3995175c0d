# make demo       train a tiny FLAVA on the embedded data, evaluate it, write a report   (QUICK=1: a first look in 2 minutes)
# make test       lint, types and tests as they run before every change                  (at most 20 minutes)
# make test-all   the long tests too, and Ray's
# make lint       ruff and mypy alone
# make setup      the environment alone; make clean removes it
#
# Options: PYTHON=python3.12   DEMO_ARGS="--out runs/mine"   TEST_ARGS="-k search -x"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

# A torch that $(PYTHON) already has is one that somebody fitted to this machine's driver: it is used as it is, through
# --system-site-packages. Where there is none, or one too old for us (below 2.11), constraints.txt says which one is installed. pip's own settings
# (PIP_INDEX_URL and the like) decide whether that is a CPU or a CUDA build.
HAS_TORCH = import re, sys, importlib.metadata as m; found = [d.version for d in m.distributions(name="torch")]; \
	sys.exit(not found or [int(n) for n in re.findall("[0-9]+", found[0])[:2]] < [2, 11])

.PHONY: demo test test-all lint setup clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/trivium demo $(if $(QUICK),--quick) $(DEMO_ARGS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(TEST_ARGS)

test-all: lint $(VENV)/.installed-all
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(TEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

setup: $(VENV)/.installed-dev

clean:
	rm -rf $(VENV)

$(BIN)/python:
	@echo "making $(VENV), once; this takes a few minutes"
	@if $(PYTHON) -c '$(HAS_TORCH)'; then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi

# The interpreter is an order-only prerequisite: its date says nothing about what is installed.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@if $(BIN)/python -c '$(HAS_TORCH)'; then $(PIP) -e .; else $(PIP) -c constraints.txt -e .; fi
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) -e '.[dev]'
	@touch $@

# Ray is large and has no build for every Python: where it cannot be had, its one test is skipped by name.
$(VENV)/.installed-all: $(VENV)/.installed-dev
	@if $(PIP) -e '.[scale]'; then touch $@; else echo "without the extra scale (Ray): its test will be skipped"; fi
