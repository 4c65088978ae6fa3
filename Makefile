# `make help` lists what there is. All but what is for a GPU sets up .venv by itself, with the
# versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo demo-images test test-docs test-all test-gpu test-oldest check format bench \
	bench-quick bench-start bench-several bench-service bench-gpu clean

help: ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

demo: $(STAMP) ## teach the bundled model pig latin: the first thing to try
	$(BIN)/lorakit demo
	@echo "lorakit is in $(BIN): '. $(BIN)/activate' makes it a command of this shell"

demo-images: $(STAMP) ## teach the bundled vision-language model to read digits
	$(BIN)/lorakit demo digits

test: $(STAMP) ## the fast tests, in two processes (8 minutes at most on two idle cores)
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

test-docs: $(STAMP) ## every shell block of README and docs/, in a fresh folder, on tiny models
	$(BIN)/python -m pytest tests/test_docs.py tests/test_library_page.py tests/cli/test_readme_images.py -m ""

# The fast ones in two processes; then the slow ones, each of which wants the machine for itself.
test-all: test ## the fast tests, then the slow ones: kill storms, clusters, mutations (an hour)
	$(BIN)/python -m pytest -m "slow and not gpu"

# On a machine with a GPU, in whatever environment has its torch and lorakit's other requirements (PYTHON).
test-gpu: ## the tests that need a GPU, in the environment of PYTHON
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu

# The fast tests on the lowest versions that pyproject.toml allows (a download of gigabytes: that torch has no build without CUDA).
test-oldest: .venv-oldest/.installed ## the fast tests on the lowest versions that are allowed
	.venv-oldest/bin/python -m pytest -m "not slow"

.venv-oldest/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check uv torch==2.10.0 setuptools wheel
	VIRTUAL_ENV=.venv-oldest .venv-oldest/bin/uv pip install --quiet --resolution lowest-direct -e ".[all]"
	VIRTUAL_ENV=.venv-oldest .venv-oldest/bin/uv pip install --quiet pytest hypothesis build hatchling
	touch .venv-oldest/.installed

check: $(STAMP) ## lint, format and types, nothing changed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## beside PEFT, TRL and transformers (25 minutes)
	$(BIN)/python scripts/bench/bench.py

bench-quick: $(STAMP) ## the same with fewer rows (5 minutes)
	$(BIN)/python scripts/bench/bench.py --quick

bench-start: $(STAMP) ## from the start of a program to its first line and its first step
	$(BIN)/python scripts/bench/start.py

bench-several: $(STAMP) ## several processes beside separate runs, and the longest rows they can share
	$(BIN)/python scripts/bench/several.py
	$(BIN)/python scripts/bench/several.py --sequence

bench-service: $(STAMP) ## many adapters on one base, sampling beside transformers, the server
	$(BIN)/python scripts/bench/service.py

# On a machine with a GPU: runs in whatever environment has its torch (PYTHON), not in .venv, whose torch is for the CPU.
bench-gpu: ## on a machine with a GPU, in the environment of PYTHON
	PYTHONPATH=. $(PYTHON) scripts/bench/gpu.py

clean: ## remove environments, builds and runs of this folder
	rm -rf $(VENV) .venv-oldest build dist runs outputs

# torch comes first and alone: a build of a dependency that looks for torch must find this one.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing torch and the other packages of constraints.txt into $(VENV): some minutes, 2.4 GB with a build of torch for the CPU"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(STAMP)
