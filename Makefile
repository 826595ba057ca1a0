# Each target does its own set-up in .venv, with the versions of constraints.txt, and the second run finds it done.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt --editable

.PHONY: demo test check bench format clean

demo: .venv/demo-is-installed
	$(BIN)/python examples/digits.py

test: .venv/all-is-installed
	$(BIN)/python -m pytest

check: .venv/all-is-installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: .venv/all-is-installed
	$(BIN)/python -m benchmarks

format: .venv/all-is-installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist src/polyak.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo-is-installed: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) '.[demo]'
	touch $@

.venv/all-is-installed: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) '.[demo,bench,dev]'
	touch $@
