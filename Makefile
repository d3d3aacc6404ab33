# edgeopt: what a newcomer and CI type. `make help` lists the targets.
# SPDX-License-Identifier: Apache-2.0

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

# A folder with real data sets, where there is one; tests and demo use it and do without it as well.
ifeq ($(origin EDGEOPT_DATA),undefined)
ifneq ($(wildcard ../shared/data),)
export EDGEOPT_DATA := $(abspath ../shared/data)
endif
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help
help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

# torch first and alone: its CPU build is the only one that does not bring gigabytes of GPU libraries
$(STAMP): pyproject.toml agent/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "edgeopt needs Python 3.11 or newer, found $$($(PYTHON) --version); set PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "Python's venv module is missing: apt-get install python3-venv"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt -e agent -e '.[all,demo,dev]'
	@touch $@

.PHONY: install
install: $(STAMP) ## make .venv with everything that is needed here

.PHONY: demo
demo: $(STAMP) ## the whole way on a real model, with three stand-in devices (KEEP=1 keeps the fleet running)
	$(BIN)/edgeopt demo $(if $(KEEP),--keep)

.PHONY: test
test: $(STAMP) ## every test but the slow ones
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

.PHONY: test-all
test-all: $(STAMP) ## every test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: bench
bench: $(STAMP) ## our files beside the runtimes' own quantizers, in one run
	$(BIN)/python tests/benchmarks/run.py --fresh all

.PHONY: bench-all
bench-all: $(STAMP) ## the same for every model and peer (long; what peers made is kept)
	$(BIN)/python tests/benchmarks/run.py --models all --fresh efficientnet-lite0 --json .bench/benchmarks.json $(if $(PAGE),--markdown $(PAGE))

.PHONY: bench-memory
bench-memory: $(STAMP) ## peak memory of static quantization with every range method, ours and a peer's
	$(BIN)/python tests/benchmarks/memory.py $(if $(PAGE),--markdown $(PAGE))

FAULTS := .bench/faults.jsonl

# needs strace and fuse3; what is missing is skipped
.PHONY: faults
faults: $(STAMP) ## every fault at every call, cut and state, and a table of what came of it (PAGE=docs/faults.md writes it there)
	@mkdir -p .bench && rm -f $(FAULTS)
	EDGEOPT_FAULTS=$(abspath $(FAULTS)) $(BIN)/python -m pytest tests/faults -k "every" && status=0 || status=$$?; \
	  $(BIN)/python tests/faults/table.py $(FAULTS) $(PAGE); exit $$status

.PHONY: fuzz
fuzz: $(STAMP) ## a million hostile inputs (needs atheris: .venv/bin/pip install atheris)
	$(BIN)/python tests/fuzz/fuzz_run.py

CONFORMANCE := .conformance
TUF_CONFORMANCE ?= https://github.com/theupdateframework/tuf-conformance

# needs git, network and `faketime`; TUF_CONFORMANCE may be a folder or a mirror
.PHONY: conformance
conformance: $(STAMP) ## the conformance suite of The Update Framework against the agent's trust code
	@command -v faketime > /dev/null || { echo "faketime is missing: apt-get install faketime"; exit 2; }
	test -d $(CONFORMANCE)/suite || git clone --quiet --depth 1 $(TUF_CONFORMANCE) $(CONFORMANCE)/suite
	test -x $(CONFORMANCE)/venv/bin/pytest || { $(PYTHON) -m venv $(CONFORMANCE)/venv && \
	  $(CONFORMANCE)/venv/bin/pip install --quiet --constraint constraints.txt -e agent pytest pytest-json-report; }
	cd $(CONFORMANCE)/suite && ../venv/bin/python -m pytest -q -c pyproject.toml tuf_conformance \
	  --entrypoint "$(abspath $(CONFORMANCE))/venv/bin/python $(CURDIR)/tests/conformance/tuf_client.py"

.PHONY: bench-serve
bench-serve: $(STAMP) ## what serving adds to the bare runtime call, and what batches gain (MODEL=FILE.onnx: also idle and first answer)
	$(BIN)/python tests/benchmarks/serve_overhead.py $(if $(PAGE),--markdown $(PAGE))
	$(if $(MODEL),$(BIN)/python tests/benchmarks/serve_idle.py --model $(MODEL))

TRITON := .triton

# a virtual environment of its own: tritonclient wants older ml_dtypes and greenlet than what is pinned here
.PHONY: test-triton
test-triton: $(STAMP) ## the protocol's own client from PyPI against the agent
	test -x $(TRITON)/bin/python || $(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/pip install --quiet 'tritonclient[http]>=2.60'
	EDGEOPT_TRITON_PYTHON=$(abspath $(TRITON))/bin/python $(BIN)/python -m pytest -q tests/edgeopt_agent/serve/test_tritonclient.py

.PHONY: bench-drift
bench-drift: $(STAMP) ## how often drift alarms on real photos (EDGEOPT_DATA), and what watching costs; tables into the docs
	$(BIN)/python tests/benchmarks/drift_alarms.py --doc docs/monitoring.md $(if $(MODEL),--model $(MODEL))
	$(BIN)/python tests/benchmarks/drift_overhead.py --doc docs/monitoring.md

.PHONY: check
check: $(STAMP) ## linters, formatter, types, import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.10 --cache-dir .mypy_cache/agent -p edgeopt_agent -p edgeopt_wire
	$(BIN)/lint-imports

.PHONY: clean
clean: ## remove what these targets made
	rm -rf $(VENV) $(CONFORMANCE) $(TRITON) .demo .bench build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
