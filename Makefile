# Every target says what it does: `make help`.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?=
BIN := .venv/bin
UV_VERSION := 0.13.9
COMPILE := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"
ARGS ?=
BENCH ?= receive

.PHONY: help install servers demo test check format lock bench bench-receive clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

install: .venv/.installed ## Make the environment .venv with the command .venv/bin/clarion

.venv/.installed: requirements/dev.txt pyproject.toml
	@python="$(or $(PYTHON),$$(tests/tools/choose_python.sh))"; \
	test -n "$$python" || { echo "Clarion needs Python 3.11, 3.12 or 3.13 with its venv module; none was found on the PATH (Debian: apt-get install python3 python3-venv)"; exit 2; }; \
	echo "install: $$python -> .venv, packages pinned in requirements/dev.txt (about 60, 400 MB)"; \
	"$$python" -m venv --clear .venv || { echo "the venv module is missing (Debian: apt-get install python3-venv)"; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv==$(UV_VERSION)"
	@$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements/dev.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

servers: ## Install the test servers (DCMTK, Orthanc, Chromium, PostgreSQL, Java and Maven for Kafka, strace) where root may
	@tests/tools/servers.sh

demo: install ## Send a chest CT through the whole system and show what comes back (ARGS="--once", ARGS="--input FOLDER")
	@$(BIN)/clarion demo $(ARGS)

test: install servers ## Run the whole test suite with its real servers (ARGS="tests/unit -k journal")
	@$(BIN)/python tests/tools/run_tests.py $(ARGS)

check: install ## Lint, format, types, layers, sizes, wheel content, documentation: under 3 minutes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache 2>&1 | tail -n 8; test $${PIPESTATUS[0]} -eq 0
	$(BIN)/pytest -q tests/architecture

format: install ## Format the code and apply safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: install ## Compute the pinned requirement files anew
	$(COMPILE) --upgrade --extra dev --extra codecs pyproject.toml -o requirements/dev.txt
	$(COMPILE) pyproject.toml -c requirements/dev.txt -o requirements/core.txt
	$(COMPILE) --extra kafka --extra postgres --extra kubernetes --extra triton --extra s3 --extra codecs pyproject.toml -o requirements/extras.txt
	for cuda in 12 13; do $(COMPILE) --extra gpu-cuda$$cuda pyproject.toml -c requirements/dev.txt -o requirements/gpu-cuda$$cuda.txt; done

bench: install ## Measure, interleaved, as ratios: BENCH=receive (default), BENCH=events against bare Kafka clients, BENCH=latency
	@$(BIN)/python bench/$(BENCH).py $(ARGS)

bench-receive: install servers ## Measure receiving in about ten minutes: ratios against DCMTK made to sync, DCMTK at its best and Orthanc
	@$(BIN)/python bench/receive.py --rounds 3 --conc 1 4 $(ARGS)

clean: ## Remove what was built: environment, caches, artifacts
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
