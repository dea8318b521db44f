# Every command sets itself up: `make train` on a machine with Python 3.11 or later and make is enough.

# The first Python that is new enough; `make test PYTHON=/path/to/python` names another.
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13 python; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo "$$python" && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Arguments for the scripts, e.g. `make train ARGS="--smoke --optimizer adamw"`.
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup train comparison bench bench-attention kernels notebooks docs package test test-all fuzz test-newest test-oldest stacks quick \
	format lint types imports clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: $(READY)  ## the environment in .venv; every other command does this by itself

# Made again when the dependencies change, and only then.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later was found. Install one, or say make PYTHON=/path/to/python." >&2; exit 1; }
	@test -x $(BIN)/python || { echo "Making $(VENV) with $(PYTHON)"; "$(PYTHON)" -m venv $(VENV); }
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

train: $(READY)  ## train a byte-level GPT with MuonClip (ARGS="--smoke" for a minute's worth)
	$(BIN)/python examples/train_lm.py $(ARGS)

comparison: $(READY)  ## optimizers at equally tuned settings: the runs that are missing (hours on a CPU), tables, picture
	$(BIN)/python benchmarks/comparison.py $(ARGS)
	$(BIN)/python benchmarks/report.py --plot

# The only extra that brings torch, so nothing else asks for it.
$(VENV)/.bench: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	@touch $@

bench: $(VENV)/.bench  ## measure on this CPU (under 15 minutes, keep it idle): docs/performance.md; ARGS="--optax PATH": another checkout too
	$(BIN)/python benchmarks/step_time.py $(ARGS)
	$(BIN)/python benchmarks/compile_time.py
	$(BIN)/python benchmarks/polar_quality.py
	$(BIN)/python benchmarks/report.py

bench-attention: $(READY)  ## what the clip and the recording of its maxima cost (keep it idle)
	$(BIN)/python benchmarks/clip_cost.py
	$(BIN)/python benchmarks/attention_recording.py
	$(BIN)/python benchmarks/report.py

# Two compilers of 2 GB together: an environment of their own, which nothing else asks for.
KERNELS := .venv-kernels

$(KERNELS)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later was found. Install one, or say make PYTHON=/path/to/python." >&2; exit 1; }
	@test -x $(KERNELS)/bin/python || { echo "Making $(KERNELS) with $(PYTHON)"; "$(PYTHON)" -m venv $(KERNELS); }
	$(KERNELS)/bin/python -m pip install --quiet --upgrade pip
	$(KERNELS)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[test,tpu,cuda13]'
	@touch $@

# Tests that skip where these compilers are not installed.
COMPILER_TESTS := tests/sharding/test_muon_share.py tests/kernels/test_compiled.py

kernels: $(KERNELS)/.ready  ## compile every kernel with the real TPU and GPU compilers, no such machine needed
	$(KERNELS)/bin/python -m pytest -q -rs $(COMPILER_TESTS) $(ARGS)

notebooks: $(READY)  ## execute the notebooks and save what their cells return
	$(BIN)/python examples/notebooks/execute.py $(ARGS)

docs: $(READY)  ## build the documentation in build/site; what does not fit together is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir build/site

# With a tag, `make package TAG=v1.2.3`, also whether version, changelog and citation say the same.
package: $(READY)  ## build wheel and sdist in dist, and check what is in them
	$(if $(TAG),$(BIN)/python tools/check_release.py $(TAG))
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/python tools/check_package.py dist

test: lint types imports  ## what every change must pass: format, lint, types, imports, tests
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow" $(ARGS)

fuzz: $(READY)  ## random configurations against one device and NumPy (ARGS="--seconds 600 --seed 0")
	$(BIN)/python -m tests.fuzz $(ARGS)

# The annotations of shapes and types are checked at run time here alone: it costs a quarter more.
CHECKED := --jaxtyping-packages=muonclip_jax,beartype.beartype

test-all: lint types imports  ## also what is slow: examples, notebooks, site, package, long fuzz
	$(BIN)/python -m pytest -q -n 2 --dist worksteal $(CHECKED) $(ARGS)
	$(BIN)/python -m tests.fuzz --seconds 600

# All tests with other versions of JAX, each in an environment of its own. What the newest is
# depends on the Python: `make test-newest PYTHON=python3.13`.
.venv-newest/.ready .venv-oldest/.ready: .venv-%/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later was found. Install one, or say make PYTHON=/path/to/python." >&2; exit 1; }
	@test -x .venv-$*/bin/python || { echo "Making .venv-$* with $(PYTHON)"; "$(PYTHON)" -m venv .venv-$*; }
	.venv-$*/bin/python -m pip install --quiet --upgrade pip
	.venv-$*/bin/python tools/constraints.py $* > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
		--constraint .venv-$*/constraints.txt --editable '.[test]'
	@touch $@

test-newest: .venv-newest/.ready  ## the tests with the newest JAX that this PYTHON can have
	.venv-newest/bin/python -m pytest -q -n 2 --dist worksteal $(ARGS)

test-oldest: .venv-oldest/.ready  ## the tests with the oldest versions that pyproject.toml allows
	.venv-oldest/bin/python -m pytest -q -n 2 --dist worksteal $(ARGS)

# A training stack each, in an environment of its own: its packages and versions are in stacks/.
# EasyDeL, Levanter, MaxText and tunix need PYTHON=python3.12.
STACK ?= linen

.venv-stacks/%/.ready: stacks/%.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later was found. Install one, or say make PYTHON=/path/to/python." >&2; exit 1; }
	@test -x .venv-stacks/$*/bin/python || { echo "Making .venv-stacks/$* with $(PYTHON)"; "$(PYTHON)" -m venv .venv-stacks/$*; }
	.venv-stacks/$*/bin/python -m pip install --quiet --upgrade pip
	.venv-stacks/$*/bin/python -m pip install --quiet --requirement stacks/$*.txt --editable .
	@touch $@

stacks: .venv-stacks/$(STACK)/.ready  ## run a recipe of docs/stacks with the real package, e.g. STACK=equinox
	.venv-stacks/$(STACK)/bin/python examples/stacks/train_$(STACK).py $(ARGS)

# The folders whose tests compile little. What a change is about runs beside them by
# `make quick ARGS=tests/attention`.
QUICK := tests/routing tests/matrices \
	tests/newton_schulz/test_coefficients.py tests/clipping/test_clip.py \
	tests/clipping/test_maxima.py tests/clipping/test_describe.py tests/transforms/test_muon.py \
	tests/test_muonclip.py tests/test_imports.py \
	tests/test_commands.py

quick: lint imports  ## the inner loop, under two minutes: the tests that compile little
	$(BIN)/basedpyright muonclip_jax
	$(BIN)/python -m pytest -q -n 2 -m "not slow" $(QUICK) $(ARGS)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python tools/check_sizes.py

types: $(READY)
	$(BIN)/basedpyright

imports: $(READY)
	$(BIN)/lint-imports

format: $(READY)  ## format, and repair what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and what tools left
	rm -rf $(VENV) $(KERNELS) .venv-newest .venv-oldest .venv-stacks .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
