# `make demo` and `make test` do all the set-up themselves, in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin

.PHONY: demo test check kernels traffic lint clean

demo: $(VENV)/.demo
	$(BIN)/python -m engine generate demo/checkpoint --prompts demo/prompts.txt --max-tokens 160 --temperature 0
	$(BIN)/python -m engine chat demo/checkpoint --image demo/pictures/place.png --temperature 0 \
	    --message "Where is the triangle?"
	$(BIN)/python -m engine chat demo/checkpoint --image demo/pictures/all.png --temperature 0 --message "What do you see?"
	$(BIN)/python -m tools.demo_drafts

test: $(VENV)/.test
	$(BIN)/python -m pytest

# the tests of kernels again, with every access to memory watched
check: $(VENV)/.test
	$(BIN)/python -m pytest tests/kernels --check

# every kernel compiled for every architecture: registers, spills, shared memory
kernels: $(VENV)/.test
	$(BIN)/python tools/check_kernels.py

# the bytes that kernels move, counted without a GPU, beside the cost model; fails where a kernel moves more than it should
traffic: $(VENV)/.test
	$(BIN)/python tools/bench.py kernels --lane emulated

lint: $(VENV)/.test
	$(BIN)/ruff check --config .ci/ruff.toml .

$(VENV)/.demo: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
