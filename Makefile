# Everything runs inside .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV   ?= .venv
# Installed first and by exact version: the wheel that pip would choose by itself may not be it.
TORCH  ?= torch==2.13.0
PROMPT ?= Once upon a time there was a little fox who
# An interpreter with llama-cpp-python; empty means the one in .venv, if it has it.
LLAMA_PYTHON ?=
BENCH_ARGS   ?= --models nano bench-nano
export PIP_DISABLE_PIP_VERSION_CHECK = 1

BIN   := $(VENV)/bin
CORE  := $(VENV)/.installed-core
BENCH := $(VENV)/.installed-bench
DEV   := $(VENV)/.installed-dev
# Two BLAS pools fighting over few cores make tests slower, not faster.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: help demo test check bench clean
help:
	@echo "make demo    write text with the shipped nano model, drafts shown (PROMPT='...')"
	@echo "make test    CPU tests"
	@echo "make check   formatter, linter, types, layout, CPU tests"
	@echo "make bench   CPU benchmark beside transformers and llama.cpp (LLAMA_PYTHON=..., BENCH_ARGS=...)"

$(CORE): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(BENCH): $(CORE)
	$(BIN)/pip install --quiet --editable '.[bench]'
	touch $@

$(DEV): $(CORE)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: $(CORE)
	$(BIN)/qnext generate "$(PROMPT)" --model nano --max-tokens 160 \
		--temperature 0.7 --seed 11 --num-speculative-tokens 1 --show-accepted

test: $(DEV)
	$(TEST_ENV) $(BIN)/python -m pytest -q -m "not slow and not gpu and not network" --durations=10

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layout.py
	$(MAKE) --no-print-directory test

bench: $(BENCH)
	$(BIN)/python -m benchmarks.cpu $(BENCH_ARGS) $(if $(LLAMA_PYTHON),--llama-python $(LLAMA_PYTHON))

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
