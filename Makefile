PYTHON ?= python3
VENV ?= .venv
TEST_PROCESSES ?= 2

.PHONY: setup demo test bench lint

setup: $(VENV)/ready

$(VENV)/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@

demo: setup
	$(VENV)/bin/python generate.py

# Tests compute on one thread. "worksteal" leaves most tests of a file in one process, which makes its fixtures once.
test: setup
	$(VENV)/bin/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

bench: setup
	$(VENV)/bin/python -m benchmarks.tiny_world
	$(VENV)/bin/python -m benchmarks.peers dit
	$(VENV)/bin/python -m benchmarks.peers vae
	$(VENV)/bin/python -m benchmarks.tiny_world --gguf-types Q8_0,Q6_K,Q5_K_M,Q4_K_M,Q3_K_M,Q2_K
	$(VENV)/bin/python -m benchmarks.peers gguf
	$(VENV)/bin/python -m benchmarks.cache_quality --task t2v-tiny
	$(VENV)/bin/python -m benchmarks.cache_overhead
	$(VENV)/bin/python -m benchmarks.comm
	$(VENV)/bin/python -m benchmarks.loading
	$(VENV)/bin/python -m benchmarks.converting
	$(VENV)/bin/python -m benchmarks.parallel_overhead
	$(VENV)/bin/python -m benchmarks.plan_memory
	$(VENV)/bin/python -m benchmarks.expert_swap
	$(VENV)/bin/python -m benchmarks.offload
	$(VENV)/bin/python -m benchmarks.attention
	$(VENV)/bin/python -m benchmarks.tiny_world_lora stripes
	$(VENV)/bin/python -m benchmarks.tiny_world_lora distilled
	$(VENV)/bin/python -m benchmarks.film_drift
	for what in load cancels kills; do $(VENV)/bin/python -m benchmarks.serve $$what; done
	PYTHON=$(VENV)/bin/python bash benchmarks/bench_teacache.sh

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
