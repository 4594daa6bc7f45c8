# The commands of the project. Python 3.11 or newer is all that they need; no C compiler.
#
#   make demo PYTHON=python3.12         another interpreter for the environment
#   make demo CONSTRAINTS=              torch as pip chooses it, for a machine with a GPU (or name a file of your own)

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt

BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
RECIPES := pyproject.toml $(CONSTRAINTS)

.PHONY: help install demo test sweep check bench clean

help:
	@echo "make install   .venv with the brushstroke command"
	@echo "make demo      trains three adapters on a real model; BRUSHSTROKE_DEMO=quick for the short form"
	@echo "make test      the whole test suite, with samples of the sweeps"
	@echo "make sweep     the long tests in full: chat templates, killed writers, README and demo on the real model"
	@echo "make check     ruff, pyright, import-linter"
	@echo "make bench     the benchmarks of speed and memory"
	@echo "make clean     remove .venv, caches and demo-out"

install: $(VENV)/.installed

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "brushstroke needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Run: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --upgrade pip
	@touch $@

$(VENV)/.installed: $(RECIPES) | $(VENV)/.created
	$(PIP_INSTALL) --editable '.[gguf,study]'
	@touch $@

$(VENV)/.installed-dev: $(RECIPES) | $(VENV)/.created
	$(PIP_INSTALL) --editable '.[gguf,study,dev]' 'pyright[nodejs]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-bench: $(RECIPES) | $(VENV)/.created
	$(PIP_INSTALL) --editable '.[gguf,study,bench]'
	@touch $@ $(VENV)/.installed

# Unsloth's pins clash with ours; it trains on a CPU without the packages that only GPUs need.
$(VENV)-unsloth/.installed: $(RECIPES)
	$(PYTHON) -m venv $(VENV)-unsloth
	$(VENV)-unsloth/bin/python -m pip install --quiet --disable-pip-version-check --no-input $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) \
	  --editable . 'transformers<=5.17.0' 'trl<=1.15.0' 'datasets<5' peft accelerate diffusers einops hf_transfer json5 msgspec \
	  nest-asyncio protobuf sentencepiece structlog tyro
	$(VENV)-unsloth/bin/python -m pip install --quiet --disable-pip-version-check --no-input --no-deps \
	  'unsloth>=2026.10' 'unsloth_zoo>=2026.10' bitsandbytes cut_cross_entropy torchao triton
	@touch $@

demo: install
	$(BIN)/python examples/demo/demo.py

# Compiled graphs first, in a process of their own: torch.compile cannot trace functions that check shapes. Then one worker
# per core, with one thread each. A worker runs all tests of a file. Files run in the order of their names: by default pytest
# runs files with few tests last, and these contain the longest tests (endtoend).
test: $(VENV)/.installed-dev
	$(BIN)/python -m brushstroke.samples.assets
	$(BIN)/python -m pytest tests/compile
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore=tests/compile --jaxtyping-packages=brushstroke,shapes.checked \
	  --numprocesses auto --dist loadfile --no-loadscope-reorder

sweep: $(VENV)/.installed-dev
	$(BIN)/python -m brushstroke.samples.assets
	OMP_NUM_THREADS=1 BRUSHSTROKE_SWEEP=1 $(BIN)/python -m pytest tests -m sweep --numprocesses auto --dist loadgroup

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(VENV)/.installed-bench $(VENV)-unsloth/.installed
	$(BIN)/python -m brushstroke.samples.assets
	$(BIN)/python benchmarks/training_speed.py --sides brushstroke,peft,grouped,best,unsloth,trl,full
	$(BIN)/python benchmarks/training_speed.py --sides brushstroke,peft,best,unsloth --dtype bfloat16
	$(BIN)/python benchmarks/training_speed.py --task instruction --sides brushstroke,peft
	$(BIN)/python benchmarks/training_speed.py --task instruction --sides brushstroke,peft --batch-size 32 --peer-parts 4 --steps 3
	$(BIN)/python benchmarks/training_speed.py --task plain --sides brushstroke,peft
	@for file in $(filter-out benchmarks/training_speed.py,$(wildcard benchmarks/[a-z]*.py)); do \
	  echo "$$file"; $(BIN)/python $$file || exit 1; done

clean:
	rm -rf $(VENV) $(VENV)-unsloth build dist demo-out .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
