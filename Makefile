# Each target does its own set-up in .venv, with the versions of constraints.txt, and the second run finds it done.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt --editable
# timm without what it requires: tests and benchmarks need a few files of it, and torchvision is large.
TIMM := $(BIN)/pip install --quiet --constraint constraints.txt --no-deps timm

.PHONY: demo test check bench fuzz crashtest format clean

demo: .venv/demo-is-installed
	$(BIN)/python examples/digits.py

# The first run is without the kernel in C, as where there is no compiler.
test: .venv/all-is-installed
	POLYAK_KERNELS=foreach,staged $(BIN)/python -m pytest tests/average/test_average.py tests/test_model_ema.py tests/kernels/test_modes.py tests/store/test_swap.py
	$(BIN)/python -m pytest

check: .venv/all-is-installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: .venv/bench-is-installed
	$(BIN)/python -m benchmarks

# Broken files of every layout: each must be refused in one kind of error, or read rightly.
fuzz: .venv/all-is-installed
	$(BIN)/python tests/support/fuzz.py --files 100000

# Kills writers, fills disks and cuts the power while files are saved; `python -m tests.crash --help` for more.
crashtest: .venv/all-is-installed
	$(BIN)/python -m tests.crash

format: .venv/all-is-installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv build dist src/polyak.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo-is-installed: .venv/bin/python pyproject.toml setup.py $(wildcard src/polyak/kernels/native/*.[ch]) constraints.txt
	$(INSTALL) '.[demo]'
	touch $@

.venv/all-is-installed: .venv/bin/python pyproject.toml setup.py $(wildcard src/polyak/kernels/native/*.[ch]) constraints.txt
	$(INSTALL) '.[demo,dev]'
	$(TIMM)
	touch $@

.venv/bench-is-installed: .venv/bin/python pyproject.toml setup.py $(wildcard src/polyak/kernels/native/*.[ch]) constraints.txt
	$(INSTALL) '.[bench]'
	$(TIMM)
	touch $@
