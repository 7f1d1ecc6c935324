PYTHON ?= python3
VENV ?= .venv

.PHONY: setup demo test bench lint

setup: $(VENV)/ready

$(VENV)/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: setup
	$(VENV)/bin/python generate.py

test: setup
	$(VENV)/bin/python -m pytest

bench: setup
	$(VENV)/bin/python -m benchmarks.tiny_world
	$(VENV)/bin/python -m benchmarks.peers dit
	$(VENV)/bin/python -m benchmarks.peers vae

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
