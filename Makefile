# Two commands: `make quickstart` and `make test`. Each does all of its own set-up, in .venv.

PYTHON ?= python3
VENV ?= .venv
# The same pin fetches the CUDA build where the package index serves it, and the CPU build where it serves that.
TORCH ?= torch==2.13.0
KILLS ?= 200
SEED ?= 1
EVERY ?= 0
UPDATES ?= 6000
BIN := $(VENV)/bin
# What is imported is compiled below; compiling all of PyTorch's files takes a minute.
PIP := $(BIN)/python -m pip install -q --no-compile

.PHONY: quickstart test long-test campaign check replay bench install clean

quickstart: install  ## raw text to a trained model, on whatever this machine has
	@$(BIN)/dsllama quickstart $(ARGS)

test: $(VENV)/.test  ## the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

long-test: $(VENV)/.test  ## the long campaigns
	$(BIN)/python -m pytest -m long $(ARGS)

campaign: $(VENV)/.test  ## a run that is killed KILLS times and goes on, held against one that never died
	$(BIN)/python -m tests.crashes --kills $(KILLS) --seed $(SEED) --every $(EVERY) --updates $(UPDATES)

check: $(VENV)/.test  ## lint, layout and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

replay: $(VENV)/.test  ## write tests/golden anew, where a change of the numbers is meant
	$(BIN)/python -m tests.replay

bench: $(VENV)/.test  ## what it costs, beside what a user would pick instead; results in benchmarks/results
	$(BIN)/python -m benchmarks.loader
	$(BIN)/python -m benchmarks.encode
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.sums
	$(BIN)/python -m benchmarks.checkpoint

install: $(VENV)/.installed

$(VENV)/.torch:
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) here: install Python 3.11 or newer"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)'
	@touch $@

$(VENV)/.installed: $(VENV)/.torch setup.py
	$(PIP) -e .
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c 'import torch, deepspeed, deepspeed.launcher.launch, torch.utils.tensorboard, matplotlib.figure'
	@$(BIN)/python -m dsllama.quickstart
	@touch $@

$(VENV)/.test: $(VENV)/.installed
	$(PIP) -e '.[test]'
	@touch $@

clean:  ## the virtual environment and what the quickstart wrote
	rm -rf $(VENV) runs/quickstart
