# Every target makes the virtual environment it needs; nothing but python3 and make has to be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
MINUTES ?= 10
SEED ?= 0
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test coverage standard ray crash soak lint types docs bench picture clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

venv: $(STAMP)  ## make .venv with the pinned dependencies

# pip knows --group since 25.1; a new virtual environment has what Python came with.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "pip>=25.1"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]" --group dev
	touch $@

demo: $(STAMP)  ## a long tool log, questions, a restart, questions again
	$(BIN)/infllm-agent demo

# Two processes of one thread each are nearly twice as fast as one of two, and threads of several processes that share
# cores spend their time waiting for each other.
test: $(STAMP)  ## run the tests; ARGS="-k hub" for some of them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

coverage: $(STAMP)  ## run the tests, and say which lines and branches none of them reaches
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n $(WORKERS) --dist loadfile $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

crash: $(STAMP)  ## long runs of kills, faults, damage, races, attacks; MINUTES=60 SEED=1 ARGS="kills --count kills=5000"
	mkdir -p bench-results
	OMP_NUM_THREADS=1 PYTHONPATH=tests/helpers $(BIN)/python -m survival crash $(ARGS) --minutes $(MINUTES) --seed $(SEED) \
		--json bench-results/crash.json

soak: $(STAMP)  ## long runs of threads and of a session that grows; MINUTES=120 ARGS="growth --tokens 10000000"
	mkdir -p bench-results
	OMP_NUM_THREADS=1 PYTHONPATH=tests/helpers $(BIN)/python -m survival soak $(ARGS) --minutes $(MINUTES) --seed $(SEED) \
		--json bench-results/soak.json

standard: $(STAMP)  ## langchain-tests' suites through ChatOpenAI against the server
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integrations/server/standard.py $(ARGS)

ray: $(STAMP)  ## install Ray Serve, and test two replicas
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[ray]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/integrations/test_ray_serve.py $(ARGS)

lint: $(STAMP)  ## check style, formatting and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

types: $(STAMP)  ## check types
	$(BIN)/mypy

docs: $(STAMP)  ## build the documentation into site/, without the network; every broken link fails it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(STAMP)  ## measure retrieval and speed; results in bench-results/
	mkdir -p bench-results
	$(BIN)/infllm-agent bench retrieval --task passkey --tokens 16384 --method infllm,truncate \
		--json bench-results/retrieval.json --plot bench-results
	$(BIN)/infllm-agent bench speed --histories 2048,16384 --systems infllm,plain --json bench-results/speed.json \
		--plot bench-results

picture: $(STAMP)  ## draw docs/demo.svg and docs/chat.svg from real runs
	$(BIN)/python docs/tools/picture.py
	$(BIN)/python docs/tools/chat_picture.py

clean:  ## remove what the other targets made
	rm -rf $(VENV) site build dist *.egg-info bench-results .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
