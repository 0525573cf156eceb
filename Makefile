# `make serve` and `make test` do all the set-up. pip's environment variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, …) pass through.
PYTHON ?= python3
PORT ?= $(or $(EBJDAT_PORT),8000)
HOST ?= $(or $(EBJDAT_HOST),127.0.0.1)
MODEL ?=
# some shells and compilers export HOST as the name of the machine: ignore it
ifeq ($(origin HOST),environment)
HOST := $(if $(filter 127.0.0.1 localhost 0.0.0.0 ::,$(HOST)),$(HOST),$(or $(EBJDAT_HOST),127.0.0.1))
endif
VENV := .venv
BIN := $(VENV)/bin
ENGINE_EXTRA := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
# onnxruntime and onnxruntime-gpu overwrite each other: remove the other one when a machine gains or loses its GPU
OTHER_ENGINE := $(if $(filter gpu,$(ENGINE_EXTRA)),onnxruntime,onnxruntime-gpu)
KEY := $(shell cat pyproject.toml constraints.txt | cksum | tr ' ' '-')
SERVE_STAMP := $(VENV)/.stamp-serve-$(ENGINE_EXTRA)-$(KEY)
DEV_STAMP := $(VENV)/.stamp-dev-$(ENGINE_EXTRA)-$(KEY)
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: help serve test test-slow test-all coverage coverage-test check fix setup soak bench gpu-check gpu-rehearse browser-check clean
help:
	@echo "make serve [PORT=8000] [HOST=127.0.0.1] [MODEL=bundle-or-store]   install and serve"
	@echo "make test                                                        install and test (minutes)"
	@echo "make test-all                                                    adds the slow tests, with branch coverage"
	@echo "make check | fix | test-slow | soak | bench | gpu-check | gpu-rehearse | browser-check | setup | clean"

serve: $(SERVE_STAMP)
	exec $(BIN)/ebjdat-serve serve $(MODEL) --host $(HOST) --port $(PORT)

# docs/testing.md describes the tiers. With COVERAGE=1 each tier also writes its coverage data, for `make coverage`.
MEASURED := $(CURDIR)/.coverage
run_tests = $(if $(COVERAGE),rm -rf $(MEASURED)/$@ && $(BIN)/coverage run --data-file=$(MEASURED)/$@/data,$(BIN)/python) \
	-m pytest --numprocesses auto
# minimum coverage of lines and branches, in percent: measured without a GPU, a browser or CIFAR-10, rounded down; FLOOR_ALL is a lower
# bound until `make test-all` has run completely
FLOOR_TEST := 73
FLOOR_ALL := 74

# each process computes with one thread: where there are more threads than cores, they wait for each other
test test-slow soak: export OMP_NUM_THREADS := 1

test: $(DEV_STAMP)
	$(run_tests) --dist worksteal -m "not slow"

test-slow: $(DEV_STAMP)
	$(run_tests) --dist loadfile --no-loadscope-reorder -m slow

test-all:
	$(MAKE) test COVERAGE=1
	$(MAKE) test-slow COVERAGE=1
	$(MAKE) coverage

coverage: coverage-test
	@mkdir -p $(MEASURED)/all
	@$(BIN)/coverage combine --quiet --keep --data-file=$(MEASURED)/all/data $(MEASURED)/test $(MEASURED)/test-slow
	@echo "coverage of both tiers:"
	$(BIN)/coverage report --data-file=$(MEASURED)/all/data --format=total --fail-under=$(FLOOR_ALL)

coverage-test: $(DEV_STAMP)
	@mkdir -p $(MEASURED)/everyday
	@$(BIN)/coverage combine --quiet --keep --data-file=$(MEASURED)/everyday/data $(MEASURED)/test
	$(BIN)/coverage report --data-file=$(MEASURED)/everyday/data --fail-under=$(FLOOR_TEST)

# Ten minutes of mixed load while workers are killed at random and the store changes.
soak: $(DEV_STAMP)
	$(BIN)/python -m pytest -s tests/test_soak.py --soak 600

setup: $(DEV_STAMP)

check: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --config pyproject.toml
	$(BIN)/hadolint Dockerfile

fix: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEV_STAMP)
	$(BIN)/python benchmarks/classify_load.py
	$(BIN)/python benchmarks/generate_load.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/engines.py

# Runs with the packages already installed on a GPU machine: needs torch and a GPU, but no package index.
# Results go to OUT as they come: OUT/gpu.json, a log a step.
OUT ?= build/gpu
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --out $(OUT)

# All steps of gpu-check on the CPU, at sizes that take seconds.
gpu-rehearse: $(DEV_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gpu_check.py --rehearse --out $(OUT)

# Needs Node.js 20 and Chromium: runs the tests that `make test` skips without them.
browser-check: $(DEV_STAMP)
	npm ci --prefix clients/browser --no-fund --no-audit
	$(BIN)/python -m pytest tests/test_browser.py

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is %d.%d: make PYTHON=python3.11 …" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(SERVE_STAMP): | $(BIN)/python
	@echo "installing the server [$(ENGINE_EXTRA)] into $(VENV); a second run skips this"
	@$(BIN)/python -m pip uninstall --yes --quiet $(OTHER_ENGINE) 2>/dev/null
	$(INSTALL) -e '.[$(ENGINE_EXTRA)]'
	@rm -f $(VENV)/.stamp-serve-*
	@touch $@

$(DEV_STAMP): | $(BIN)/python
	@echo "installing the development environment [$(ENGINE_EXTRA)] into $(VENV); a second run skips this"
	@$(BIN)/python -m pip uninstall --yes --quiet $(OTHER_ENGINE) 2>/dev/null
	$(INSTALL) -e '.[$(ENGINE_EXTRA),train,evaluate,clients,test,check]'
	@rm -f $(VENV)/.stamp-dev-*
	@touch $@

clean:
	rm -rf $(VENV) dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
