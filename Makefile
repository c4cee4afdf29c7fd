# Two commands from a fresh machine with Python >= 3.10 and a C++ compiler:
#
#     make demo      train, score and time everything on small models, offline
#     make test      the whole test suite
#
# Both make what they need in .venv first, and do not repeat what is there.

PYTHON ?= python3
VENV ?= .venv
# The torch that goes into a new .venv: for CUDA where the driver shows a GPU, else a CPU build. TORCH_INDEX= asks for the
# first, TORCH_INDEX=https://download.pytorch.org/whl/cpu for the second.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= $(if $(findstring GPU,$(shell nvidia-smi -L 2>/dev/null)),,https://download.pytorch.org/whl/cpu)
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
SOURCES := pyproject.toml $(wildcard backend/*) $(shell find csrc)

.DELETE_ON_ERROR:
.PHONY: help demo test bench bench-trainers lint format install torch clean

help:
	@echo "make demo | test | bench | bench-trainers | lint | format | clean"
	@echo "  test takes PYTEST_ARGS='-k token_kl', demo DEMO_ARGS, bench BENCH_ARGS"
	@echo "  any of them VENV=dir, PYTHON=python3.12, TORCH=torch==2.11.0"

demo: install
	$(BIN)/lsc-kernels demo $(DEMO_ARGS)

test: install
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadgroup $(PYTEST_ARGS)

bench: install
	$(BIN)/python -m pytest benchmarks $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.report
	$(BIN)/python -m benchmarks.accuracy

# verl and OpenRLHF are in an environment of their own.
bench-trainers: install
	scripts/trainer_environment.sh .venv-trainers $(BIN)/python
	.venv-trainers/bin/python -m pytest benchmarks/bench_trainers_ppo.py --bench-name trainers-ppo $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.report

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.installed

torch: $(VENV)/.torch

# An editable install: Python files are used where they are, only csrc/ needs this again.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	@echo "Compiling and installing into $(VENV)"
	$(PIP) --editable '.[dev]'
	@touch $@

# With TORCH_INDEX a CPU build, where this pip finds one by itself or that index has one: the build that PyPI has for Linux
# brings gigabytes of CUDA along.
$(VENV)/.torch: $(VENV)/.created
	@echo "Installing $(TORCH) into $(VENV)"
	@$(BIN)/python -c 'import torch' 2>/dev/null \
	  || { [ -n "$(TORCH_INDEX)" ] && $(PIP) '$(TORCH)+cpu' 2>/dev/null; } \
	  || $(PIP) '$(TORCH)' $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	@touch $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "$(PYTHON) is older than Python 3.10; name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) .venv-trainers build dist .pytest_cache .mypy_cache .ruff_cache .benchmarks
	rm -f lsc_kernels/_C.*.so lsc_kernels/_build_info.py
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
