# Everything happens in .venv, and every target makes that ready first. It is installed again only when setup.cfg or pyproject.toml has changed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test test-all aot aot-quick lint clean
.DEFAULT_GOAL := help

help:      ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/installed       ## a real model answers from a long document, with all and with a part of its cache
	$(BIN)/python -m experiments.demo --workdir=runs/demo

# Most of their time is XLA's, and of that most goes into making fast what runs once (with its older emitters half as much); `test-all` has its programs as
# users do. The tests of a file share programs, and so a process.
test: .venv/installed       ## the quick tests
	XLA_FLAGS="$$XLA_FLAGS --xla_cpu_use_fusion_emitters=false" JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(BIN)/python -m pytest -m "not slow and not compare and not aot" -n auto --dist loadfile

test-all: .venv/installed-compare       ## every test, the slow ones and those against PyTorch too
	$(BIN)/python -m pytest

# JAX_PLATFORMS: else jax looks for the accelerators whose compilers it finds.
aot: aot-quick       ## compile every kernel for five TPU generations and an H100, serving on one chip, training on 4 to 512; table what they need
	JAX_PLATFORMS=cpu .venv-aot/bin/python -m experiments.aot --suite=kernels --workdir=runs/aot
	JAX_PLATFORMS=cpu .venv-aot/bin/python -m experiments.aot --suite=serving --workdir=runs/aot
	JAX_PLATFORMS=cpu .venv-aot/bin/python -m experiments.aot --suite=training --workdir=runs/aot

aot-quick: .venv-aot/installed       ## the part of it that CI runs
	JAX_PLATFORMS=cpu .venv-aot/bin/python -m pytest -m "aot and not slow"

lint: .venv/installed       ## ruff
	$(BIN)/ruff check .

clean:     ## remove .venv, caches and build artefacts, but not runs/
	rm -rf .venv .venv-aot build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The compilers stand apart: a jax that finds a CUDA plugin and no CUDA complains at every import.
.venv-aot/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-aot
	.venv-aot/bin/python -m pip install -e ".[dev,aot]"
	touch $@

.venv/installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "This needs Python 3.11 or later: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e ".[dev]"
	touch $@

# On Linux, PyPI's torch brings gigabytes of CUDA; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu gets the one for the CPU.
.venv/installed-compare: .venv/installed
	$(BIN)/python -m pip install -e ".[dev,compare]"
	touch $@
