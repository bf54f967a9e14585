# One command for each thing; everything is made under .venv/ and build/. Only python3 (3.11 or newer) and
# make are needed. pip's own settings (an index, a cache, a proxy) are honoured. To choose another Python:
#     make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
# More arguments for pytest (make test PYTEST_ARGS='-k referee') and for the demo.
PYTEST_ARGS ?=
# How many processes share the tests; each needs a core and a gigabyte.
WORKERS ?= 2
DEMO_ARGS ?=
# Of 'make cuda' and 'make cuda-tests': the folder of the results; of the first, the kind of device, and which checks.
OUT ?= out
DEVICE ?= cuda
CHECKS ?=
# Of 'make test-torch'.
TORCH ?= 2.11.0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
REQUIREMENTS := pyproject.toml constraints.txt
# What the wheel is made of; folders too, so that a deleted file counts as a change.
SOURCES := pyproject.toml README.md LICENSE $(shell find src scheduler executors \
	-name __pycache__ -prune -o -name '.*' -prune -o -print)
# Expanded by the shell when a step runs: the wheel may not be there when make starts.
WHEEL = $$(echo build/wheel/rematplan-*.whl)

.DELETE_ON_ERROR:
# Two pips at once in one environment break it.
.NOTPARALLEL:
.PHONY: help demo test test-fast lint format bench docs cuda cuda-tests test-torch test-newest clean

help:
	@echo "make demo    install and run examples/train_gpt.py"
	@echo "make test    build the wheel, install it, and run the tests against it"
	@echo "make test-fast  the same without whole training loops and what takes long, within two minutes"
	@echo "make lint    ruff check, ruff format --check, mypy"
	@echo "make format  rewrite the code the way 'make lint' wants it"
	@echo "make bench   run the benchmarks"
	@echo "make docs    measure again, and write the tables and figures of docs/"
	@echo "make cuda    check and measure on a GPU, within 8 minutes (DEVICE=cpu: a dry run)"
	@echo "make cuda-tests  run the tests that need a GPU, one file per process"
	@echo "make test-torch  run the tests under another torch (TORCH=2.11.0), in an environment of its own"
	@echo "make test-newest  run the tests under the newest torch that installs"
	@echo "make clean   remove everything that make made, except for the results of make cuda"

demo: $(VENV)/.examples
	$(BIN)/python examples/train_gpt.py $(DEMO_ARGS)

# PYTHONPATH is dropped and pytest imports by importlib (pyproject.toml), so that the tests see the installed
# wheel and not the checkout; tests/packaging/test_packaging.py checks that it is so.
# worksteal: each process gets files that follow one another, so that what they share (the plans of tests/shared/steps.py, a
# file's ranks) is made in one process and not in each, and whoever is done first takes from what the others have left.
test: $(VENV)/.test
	env -u PYTHONPATH REMATPLAN_WHEEL=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# Every package on small models.
test-fast: $(VENV)/.test
	env -u PYTHONPATH REMATPLAN_WHEEL=1 OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal -m "not slow" \
		--ignore=tests/steps --ignore=tests/ecosystem $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks

docs: $(VENV)/.bench
	$(BIN)/python -m benchmarks --write

# These two take $(PYTHON) with what is installed for it, for a machine with a GPU may have no network. Where it has no torch,
# they take the tests' environment.
WITH_TORCH = $$($(PYTHON) -c 'import torch' 2>/dev/null && echo $(PYTHON) || { $(MAKE) $(VENV)/.test >&2 && echo $(BIN)/python; })

cuda:
	PYTHONPATH=src:. $(WITH_TORCH) -m benchmarks.cuda --device $(DEVICE) --out $(OUT) $(CHECKS)

cuda-tests:
	PYTHONPATH=src:. $(WITH_TORCH) -m benchmarks.cuda.suite --out $(OUT)

# The tests under another torch, in an environment of its own: its wheel is that for CUDA, of several gigabytes, and
# runs on a CPU. Where it has no file of pins, what is pinned for the torch of constraints.txt alone is left to pip.
OTHER := $(VENV)-$(TORCH)

test-torch: $(OTHER)/.made
	PYTHONPATH=src OMP_NUM_THREADS=1 $(OTHER)/bin/pytest -n $(WORKERS) $(PYTEST_ARGS)

test-newest:
	$(MAKE) test-torch TORCH=2.14.1

$(OTHER)/.made: $(REQUIREMENTS)
	rm -rf $(OTHER) && $(PYTHON) -m venv $(OTHER) && mkdir -p build
	cp constraints-torch-$(TORCH).txt build/constraints-$(TORCH).txt 2>/dev/null || \
		grep -vE '^(torch|triton|nvidia-[a-z0-9-]*|setuptools|sympy|fsspec)==' constraints.txt >build/constraints-$(TORCH).txt
	$(OTHER)/bin/python -m pip --disable-pip-version-check install --quiet --constraint build/constraints-$(TORCH).txt \
		torch==$(TORCH) ".[examples,test]"
	$(OTHER)/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes rematplan
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-* build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src scheduler executors tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Each file below marks a step that is done: it is repeated only when what it depends on is newer.

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || { \
		echo "make: there is no '$(PYTHON)'; install Python 3.11 or newer, or name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: '$(PYTHON)' is older than Python 3.11; name a newer one: make PYTHON=..." >&2; exit 1; }
	@test ! -e $(VENV) || { \
		echo "make: $(VENV) exists, but make did not finish making it: remove it, or choose another: make VENV=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 \
		|| { rm -rf $(VENV); $(PYTHON) -m virtualenv --quiet $(VENV) 2>/dev/null; } \
		|| { rm -rf $(VENV); \
			echo "make: '$(PYTHON)' cannot make virtual environments: install its venv module (Debian and" >&2; \
			echo "make: Ubuntu: apt install python3-venv) or virtualenv, or name another Python: make PYTHON=..." >&2; \
			exit 1; }
	@touch $@

$(VENV)/.tools: $(REQUIREMENTS) | $(VENV)/.made
	$(INSTALL) build hatchling
	@touch $@

build/wheel/.built: $(SOURCES) $(VENV)/.tools
	@rm -rf build/wheel && mkdir -p build
	$(BIN)/python -m build --wheel --no-isolation --outdir build/wheel . >build/wheel.log 2>&1 \
		|| { cat build/wheel.log >&2; exit 1; }
	@touch $@

# Only the wheel; what it needs comes with the extras below.
$(VENV)/.wheel: build/wheel/.built
	$(PIP) install --quiet --no-deps --force-reinstall $(WHEEL)
	@touch $@

# The sets of extras, each on top of the installed wheel.
$(VENV)/.needs-examples: EXTRAS := examples
$(VENV)/.needs-test: EXTRAS := test
$(VENV)/.needs-dev: EXTRAS := dev,examples,test
$(VENV)/.needs-%: $(REQUIREMENTS) | $(VENV)/.wheel
	@echo "installing what rematplan[$(EXTRAS)] needs; the first time takes a minute or two"
	$(INSTALL) "$(WHEEL)[$(EXTRAS)]"
	@touch $@

# A peer that cannot be installed (pyrevolve needs a C++ compiler) leaves a row of a table empty, no more.
$(VENV)/.needs-bench: $(VENV)/.needs-examples
	$(INSTALL) "$(WHEEL)[bench]" || echo "make: not all peers can be installed; their rows will say so" >&2
	@touch $@

$(VENV)/.examples $(VENV)/.bench $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: $(VENV)/.needs-% $(VENV)/.wheel
	@touch $@
