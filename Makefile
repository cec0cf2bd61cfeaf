# One command each; every target makes the environment it needs (Python >= 3.10 and make are enough).
#
#   make demo      train fair models on the bundled census data and show what the layer does
#   make test      run all tests              make lint    style, formatting, types, imports
#   make docs      build the documentation    make bench   measure, and write bench/results/
#   make fuzz      property tests on problems never drawn before
#   make clean     remove everything that make made
#
# TORCH says which build of torch to install: an exact version, so that pip never picks one on its own.
# Where pip's index serves builds for a GPU and the CPU build is wanted, name that build and its index:
#   make test TORCH='torch==2.13.0+cpu --extra-index-url ADDRESS'

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BENCH_VENV ?= .venv-bench
# The backend qpth needs nothing but torch; its metadata asks for NumPy 1 and for CVXPY.
QPTH ?= qpth==0.0.18
# What else to hand to pip (a constraint: make test PIP_ARGS='numpy<2'), to pytest and to the demo.
PIP_ARGS ?=
PYTEST_ARGS ?=
# Processes that the tests are dealt out to; 0 runs them in one. Threads of OpenMP that wait must let
# the others work: spinning, they make a test ten times as long.
TEST_WORKERS ?= 2
# What `make fuzz` draws its problems from: a number, which repeats a run. And which tests it runs.
SEED ?= $(shell date +%s)
FUZZ_TESTS ?= tests
DEMO_ARGS ?=
BENCH_ARGS ?=

python := $(VENV)/bin/python
bench_python := $(BENCH_VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
.NOTPARALLEL: # two targets share one environment
.PHONY: help demo test fuzz lint docs bench clean check-python

help:
	@sed -n '/^#   make [a-z]*  /s/^# //p' Makefile

demo: $(VENV)/.stamp-demo
	$(python) -m fairopt demo $(DEMO_ARGS)

test: $(VENV)/.stamp-test
	OMP_WAIT_POLICY=passive $(python) -m pytest -n $(TEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

fuzz: seed := $(SEED)
fuzz: $(VENV)/.stamp-test
	@echo "seed $(seed); to repeat: make fuzz SEED=$(seed)"
	OMP_WAIT_POLICY=passive $(python) -m pytest -n $(TEST_WORKERS) --dist worksteal -m hypothesis \
	    --hypothesis-profile=random --hypothesis-seed=$(seed) $(FUZZ_TESTS) $(PYTEST_ARGS)

lint: $(VENV)/.stamp-lint
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	$(VENV)/bin/lint-imports

docs: $(VENV)/.stamp-docs
	$(python) -m sphinx --fail-on-warning --keep-going -q -b html docs docs/_build/html
	@echo "documentation: docs/_build/html/index.html"

bench: $(BENCH_VENV)/.stamp-bench
	$(bench_python) -m bench $(BENCH_ARGS)

clean:
	rm -rf $(VENV) $(BENCH_VENV) .venv-numpy1 build dist docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find fairopt tests bench docs -name __pycache__ -type d -prune -exec rm -rf {} +

# ---------------------------------------------------------------- environments
# A stamp is written last, so an installation that was cut short has none and runs again. While pip is
# at work the marker .unfinished stands in the environment; whoever finds it starts from an empty one,
# because half-written packages can look installed.

define install # $(1): environment, $(2): what to install, $(3): what to install without its dependencies
	@$(check_python)
	@if [ ! -x $(1)/bin/python ] || [ -e $(1)/.unfinished ]; then \
	    rm -rf $(1) && mkdir -p $(1) && touch $(1)/.unfinished && \
	    { $(PYTHON) -m venv $(1) || { \
	        echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }; }; \
	fi
	@touch $(1)/.unfinished
	$(1)/bin/python -m pip install --quiet $(TORCH) $(2) $(PIP_ARGS)
	$(if $(3),$(1)/bin/python -m pip install --quiet --no-deps $(3))
	@rm $(1)/.unfinished && touch $@
endef

define check_python
command -v $(PYTHON) >/dev/null 2>&1 || { \
    echo "error: '$(PYTHON)' not found; install Python 3.10 or newer, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
    echo "error: fairopt needs Python 3.10 or newer, '$(PYTHON)' is $$($(PYTHON) -V 2>&1); name another: make PYTHON=/path/to/python3" >&2; exit 1; }
endef

$(VENV)/.stamp-demo: pyproject.toml
	$(call install,$(VENV),-e '.[demo]')

$(VENV)/.stamp-test: pyproject.toml
	$(call install,$(VENV),-e '.[test]',$(QPTH))

$(VENV)/.stamp-lint: pyproject.toml
	$(call install,$(VENV),-e '.[lint]')

$(VENV)/.stamp-docs: pyproject.toml
	$(call install,$(VENV),-e '.[docs]',$(QPTH))

$(BENCH_VENV)/.stamp-bench: pyproject.toml bench/requirements.txt
	$(call install,$(BENCH_VENV),-r bench/requirements.txt -e .,$(QPTH))
