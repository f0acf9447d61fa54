# make demo   a real model, converted, measured and reported (under ten minutes, 2 cores)
# make test   style, types and every test that needs no GPU
# Both make their own virtual environment in .venv and need nothing else.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint real-model-test clean

$(VENV)/installed: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[gguf,test]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/python examples/demo.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p moecompile

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2

# The figures of docs/quality.md that concern the real model; downloads it and takes some ten minutes.
real-model-test: $(VENV)/installed
	$(BIN)/python -m pytest -m real_model

clean:
	rm -rf $(VENV) demo-output build dist *.egg-info
