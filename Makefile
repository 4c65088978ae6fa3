# make demo | demo-images | test | test-docs | test-all | test-gpu | test-oldest | check | format | bench | bench-quick | bench-several | bench-service | bench-gpu. All but those for a GPU set up .venv by themselves, with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo demo-images test test-docs test-all test-gpu test-oldest check format bench bench-quick bench-several bench-service bench-gpu clean

demo: $(STAMP)
	$(BIN)/lorakit demo
	@echo "lorakit is in $(BIN): '. $(BIN)/activate' makes it a command of this shell"

demo-images: $(STAMP)
	$(BIN)/lorakit demo digits

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

# Every shell block of README and docs/, in a fresh folder, on tiny models.
test-docs: $(STAMP)
	$(BIN)/python -m pytest tests/test_docs.py tests/test_library_page.py tests/cli/test_readme_images.py -m ""

# The fast ones in two processes; then the slow ones, each of which wants the machine for itself.
test-all: test
	$(BIN)/python -m pytest -m "slow and not gpu"

# On a machine with a GPU, in whatever environment has its torch and lorakit's other requirements (PYTHON).
test-gpu:
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu

# The fast tests on the lowest versions that pyproject.toml allows (a download of gigabytes: that torch has no build without CUDA).
test-oldest: .venv-oldest/.installed
	.venv-oldest/bin/python -m pytest -m "not slow"

.venv-oldest/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check uv torch==2.10.0 setuptools wheel
	VIRTUAL_ENV=.venv-oldest .venv-oldest/bin/uv pip install --quiet --resolution lowest-direct -e ".[all]"
	VIRTUAL_ENV=.venv-oldest .venv-oldest/bin/uv pip install --quiet pytest hypothesis build hatchling
	touch .venv-oldest/.installed

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench bench-quick: $(STAMP)
	$(BIN)/python scripts/bench/bench.py $(if $(filter bench-quick,$@),--quick)

# Several processes beside separate runs, and the longest rows that they can share.
bench-several: $(STAMP)
	$(BIN)/python scripts/bench/several.py
	$(BIN)/python scripts/bench/several.py --sequence

# Many adapters on one base, sampling beside transformers, calls through the server.
bench-service: $(STAMP)
	$(BIN)/python scripts/bench/service.py

# On a machine with a GPU: runs in whatever environment has its torch (PYTHON), not in .venv, whose torch is for the CPU.
bench-gpu:
	PYTHONPATH=. $(PYTHON) scripts/bench/gpu.py

clean:
	rm -rf $(VENV) .venv-oldest build dist runs outputs

# torch comes first and alone: a build of a dependency that looks for torch must find this one.
$(STAMP): pyproject.toml constraints.txt
	@echo "installing torch and the other packages of constraints.txt into $(VENV): some minutes, 2.4 GB with a build of torch for the CPU"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(STAMP)
