# `make demo` and `make test` each work as the only command typed on a fresh machine: they set up .venv first.
# Choose another interpreter with `make test PYTHON=python3.12`; a pip mirror or an index with CPU builds of torch
# with pip's own PIP_INDEX_URL and PIP_EXTRA_INDEX_URL.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
BIN := $(VENV)/bin
# Compiled modules are kept: the suite starts a hundred interpreters, each of which would compile the package anew.
export PYTHONDONTWRITEBYTECODE :=
STAMP := $(VENV)/.installed

# Versions that people and CI install, and the oldest that pyproject.toml admits; `make lock` makes both.
LOCK := constraints/lock.txt
OLDEST := constraints/oldest.txt
# What `make test-latest` asks the index for, and what it upgrades past the bounds of pyproject.toml.
LATEST_TORCH ?= torch
BEYOND ?=

# Measured on two cores.
SETUP_TIME := 2 minutes
TEST_TIME := 1 minute
DEMO_TIME := 1 minute
ENGINES_TIME := half a minute
DOCUMENTED_TIME := 5 minutes
ATTACK_TIME := 15 minutes

ATTACK_TRIALS ?= 10000
ATTACK_SEED ?= 1

# What `make engines` compiles for; what `make bench-gpu` measures on the GPU of this machine.
TARGET_SM ?= 86,89,120
BACKEND ?= tensorrt-rtx
PRESET ?= qwen2-vl-7b
ENGINES := engines-out

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo documented engines test test-runtime slow test-latest test-oldest lock attack test-gpu test-ray test-authors gpu bench-gpu lint clean

help:
	@echo "make demo      build a bundle and ask about a film, with every token and with few, about $(DEMO_TIME)"
	@echo "make test      fast tests, about $(TEST_TIME)"
	@echo "make test-runtime  tests of the runtime without torch, in $(VENV)-runtime, about $(TEST_TIME)"
	@echo "make documented  every command that README and docs show, about $(DOCUMENTED_TIME)"
	@echo "make engines   compile the tiny model for GPUs $(TARGET_SM), without one, about $(ENGINES_TIME)"
	@echo "make slow      slow tests: the wheel, the large comparisons"
	@echo "make test-latest  fast tests with the newest versions that pyproject.toml admits, in $(VENV)-latest"
	@echo "make test-oldest  fast tests with the oldest ones, in $(VENV)-oldest"
	@echo "make lock      resolve $(LOCK) and $(OLDEST) anew"
	@echo "make attack    $(ATTACK_TRIALS) seeded attacks on files, builds and inputs, about $(ATTACK_TIME)"
	@echo "make test-gpu  tests that need a GPU"
	@echo "make test-ray  a local Ray of two workers, in $(VENV)-ray"
	@echo "make test-authors  compare with the authors' own code, in an environment of its own; needs the network"
	@echo "make gpu       all that a quarter of an hour on a GPU can show: tests, kernels, attention, prefill, decode"
	@echo "make bench-gpu prefill and decode of $(PRESET) by $(BACKEND) on the GPU of this machine"
	@echo "make lint      ruff, ruff format --check, mypy"
	@echo "make clean     remove .venv and those beside it, caches, demo-out and engines-out"

# Says what is coming before anything slow begins.
define announce
	@if [ -f $(STAMP) ] && [ ! pyproject.toml -nt $(STAMP) ] && [ ! $(LOCK) -nt $(STAMP) ]; then echo "$@: about $(1)."; \
	else echo "$@: set-up first, about $(SETUP_TIME) once, then about $(1)."; fi
	@$(MAKE) --no-print-directory -s setup
endef

setup: $(STAMP)

# The CPU build of torch where the index offers one; otherwise what the index calls by this version. What builds this
# project is locked like the rest, which pip does only for what is installed before.
$(STAMP): pyproject.toml $(LOCK)
	$(call virtualenv,$(VENV))
	@echo "installing torch $(TORCH)"
	@$(BIN)/python -m pip install -qq 'torch==$(TORCH)+cpu' 2>/dev/null || $(BIN)/python -m pip install -qq 'torch==$(TORCH)'
	@echo "installing framefusion-aot and its tools"
	@$(BIN)/python -m pip install -qq -c $(LOCK) setuptools
	@$(BIN)/python -m pip install -qq -c $(LOCK) --no-build-isolation -e '.[dev]'
	@touch $@

define virtualenv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is older than 3.11; choose another one with PYTHON=..." >&2; exit 1; }
	@[ -x $(1)/bin/python ] || $(PYTHON) -m venv $(1)
endef

demo:
	$(call announce,$(DEMO_TIME))
	@$(BIN)/python -m tools.demo

documented:
	$(call announce,$(DOCUMENTED_TIME))
	@OMP_NUM_THREADS=1 $(BIN)/python -m tools.documented

# The same build as .github/workflows/engines.yml, which publishes what is left in $(ENGINES).
engines:
	$(call announce,$(ENGINES_TIME))
	@$(BIN)/ff-export build tests/models/tiny_qwen2_vl -o $(ENGINES)/bundle --force --backend tensorrt-rtx \
	  --target-sm $(TARGET_SM) --max-input-len 512 --buckets 512 --depth 1 --engine-cache $(ENGINES)/cache
	@$(BIN)/ff-export check $(ENGINES)/bundle
	@$(BIN)/ff-export inspect $(ENGINES)/bundle
	@cd $(ENGINES)/bundle && sha256sum --quiet -c SHA256SUMS

test:
	$(call announce,$(TEST_TIME))
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile -m "not slow and not gpu"

# On what `pip install .` brings and the tests need, nothing of the toolchain: .venv makes the bundles they open.
test-runtime: setup
	$(call virtualenv,$(VENV)-runtime)
	@$(VENV)-runtime/bin/python -m pip install -qq -c $(LOCK) setuptools
	@$(VENV)-runtime/bin/python -m pip install -qq -c $(LOCK) --no-build-isolation '.[gpu,signing,server]' \
	  pytest pytest-xdist hypothesis scikit-video psutil
	@rm -rf build
	@bundles=$$($(BIN)/python -m tests.bundles) && BUNDLES=$$bundles OMP_NUM_THREADS=1 \
	  $(VENV)-runtime/bin/python -m pytest -q -n auto --dist loadfile -m "not slow and not gpu" tests/runtime

slow: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m "slow and not gpu"

# The newest of all, not of the lock. BEYOND=transformers tries what the bounds of pyproject.toml shut out.
test-latest:
	$(call virtualenv,$(VENV)-latest)
	@$(VENV)-latest/bin/python -m pip install -qq -U --upgrade-strategy eager $(LATEST_TORCH) -e '.[dev]'
	@[ -z '$(BEYOND)' ] || $(VENV)-latest/bin/python -m pip install -qq -U $(BEYOND)
	@$(VENV)-latest/bin/python -m tools.lock --installed
	@OMP_NUM_THREADS=1 $(VENV)-latest/bin/python -m pytest -q -n auto --dist loadfile -m "not slow and not gpu"

test-oldest:
	$(call virtualenv,$(VENV)-oldest)
	@$(VENV)-oldest/bin/python -m pip install -qq -c $(OLDEST) setuptools
	@$(VENV)-oldest/bin/python -m pip install -qq -c $(OLDEST) --no-build-isolation -e '.[dev]'
	@$(VENV)-oldest/bin/python -m tools.lock --installed
	@OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -q -n auto --dist loadfile -m "not slow and not gpu"

# Ray is large: an environment of its own, and no part of .ci/run.
test-ray:
	$(call virtualenv,$(VENV)-ray)
	@$(VENV)-ray/bin/python -m pip install -qq -c $(LOCK) $(LATEST_TORCH) -e '.[ray,dev]'
	@OMP_NUM_THREADS=1 $(VENV)-ray/bin/python -m pytest -q tests/runtime/ray

lock: setup
	@$(BIN)/python -m pip install -qq uv
	@$(BIN)/python -m tools.lock --torch $(TORCH)

attack:
	$(call announce,$(ATTACK_TIME))
	@$(BIN)/python -m tools.attack --trials $(ATTACK_TRIALS) --seed $(ATTACK_SEED) --write

test-gpu: setup
	@$(BIN)/python -m pip install -qq -e '.[dev,gpu,tensorrt-rtx]'
	@$(BIN)/python -m pytest -q -m gpu

# Beside the authors' own code, which is never installed into .venv: qwen-vl-utils from the package index, repositories
# as clones at the commits that docs/families.md names. Not a part of CI: their code changes when they wish.
AUTHORS ?= .authors
AUTHORS_VENV ?= .venv-authors
test-authors:
	@[ -x $(AUTHORS_VENV)/bin/python ] || $(PYTHON) -m venv $(AUTHORS_VENV)
	@$(AUTHORS_VENV)/bin/python -m pip install -qq -e . torch torchvision qwen-vl-utils decord pytest
	@mkdir -p $(AUTHORS)
	@$(AUTHORS_VENV)/bin/python -m tests.authors.repositories | while read owner name commit; do \
	  [ -d $(AUTHORS)/$$name ] && continue; \
	  echo "cloning $$owner/$$name at $$commit"; \
	  git clone -q --filter=blob:none https://github.com/$$owner/$$name $(AUTHORS)/$$name && \
	    git -C $(AUTHORS)/$$name checkout -q $$commit || \
	    { echo "$$owner/$$name could not be cloned: its tests are skipped" >&2; rm -rf $(AUTHORS)/$$name; }; \
	done
	@AUTHORS=$(abspath $(AUTHORS)) OMP_NUM_THREADS=1 $(AUTHORS_VENV)/bin/python -m pytest -q --noconftest tests/authors

# Takes what is installed: a bare machine with torch, transformers and onnxruntime does.
gpu:
	@$(or $(wildcard $(BIN)/python),python3) -m tools.gpu $(GPU_FLAGS)

bench-gpu: setup
	@$(BIN)/python -m pip install -qq -e '.[dev,gpu,tensorrt-rtx]'
	@$(BIN)/python -m tools.bench.prefill --backend $(BACKEND) --preset $(PRESET) --write
	@$(BIN)/python -m tools.bench.decode --backend $(BACKEND) --preset $(PRESET) --write

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VENV)-runtime $(VENV)-latest $(VENV)-oldest $(VENV)-ray $(AUTHORS_VENV) $(AUTHORS) demo-out $(ENGINES) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .bundles
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
