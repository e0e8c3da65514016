# `make` prints what there is. Everything runs in .venv, made on first use; with
# `make PYTHON=path/to/python ...` that interpreter is used as it is and nothing is installed.
# Without a GPU, pip may still fetch a CUDA build of torch (gigabytes); to get the CPU one:
#   make TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu' venv

TORCH ?= torch==2.13.0
BASE_PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

ifdef PYTHON
PY := $(PYTHON)
READY :=
else
PY := $(VENV)/bin/python
READY := $(STAMP)
endif

# An environment given as PYTHON need not have the project itself installed.
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels$(if $(PYTHONPATH),:$(PYTHONPATH))

DEMO_PROMPT ?= What is 27 + 45?
PYTEST_ARGS ?=
CHECKED := megatron_sdar kernels tools tests $(wildcard pretrain_sdar.py)

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-slow test-backends torture aot docs check format clean

help:  ## print this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

venv: $(READY)  ## create .venv and install the project with its tools

# torch goes first and alone: pinned, so that no dependency picks another build of it.
$(STAMP): pyproject.toml
	$(BASE_PYTHON) -m venv $(VENV)
	$(PY) -m pip install $(TORCH)
	$(PY) -m pip install -e '.[dev]'
	touch $@

demo: $(READY)  ## data, tokenizer, training on 4 processes, generation: about 90 seconds
	$(PY) tools/make_demo_data.py --output-dir demo/data
	$(PY) tools/preprocess_data.py --input demo/data/train.jsonl --tokenizer demo/data/model \
	    --output-prefix demo/data/arithmetic --overwrite
	$(PY) tools/inspect_data.py demo/data/arithmetic --tokenizer demo/data/model \
	    --cutoff-len 512 --rows 1
	OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --standalone --nproc_per_node 4 \
	    pretrain_sdar.py configs/tiny_cpu.yaml
	$(PY) tools/generate.py --model demo/output --prompt '$(DEMO_PROMPT)' \
	    --max-new-tokens 48
	@echo
	@echo 'demo/data/train.jsonl         the documents'
	@echo 'demo/data/arithmetic.bin/idx  the same, tokenised'
	@echo 'demo/data/model/              config.json and tokenizer'
	@echo 'demo/output/                  the trained model, training_loss.png, checkpoints'
	@echo 'configs/tiny_cpu.yaml         what to change next'

# Tests of one process run side by side, then those that start ranks or watch the clock. pytest
# exits with 5 where PYTEST_ARGS leave one of the two without a test.
QUICK := not slow and not backends and not torture
test: $(READY)  ## every test but the slow ones
	@side_by_side=0; alone=0; \
	$(PY) -m pytest -n auto --maxprocesses 4 --dist worksteal \
	    -m '$(QUICK) and not alone' $(PYTEST_ARGS) || side_by_side=$$?; \
	$(PY) -m pytest -m '$(QUICK) and alone' $(PYTEST_ARGS) || alone=$$?; \
	case "$$side_by_side $$alone" in "0 0" | "0 5" | "5 0") ;; *) exit 1 ;; esac

test-slow: $(READY)  ## the longer proofs
	$(PY) -m pytest -m slow $(PYTEST_ARGS)

test-backends: $(READY)  ## every layout with FlexAttention and with Triton's interpreter
	$(PY) -m pytest -m backends $(PYTEST_ARGS)

torture: $(READY)  ## many kills, faults and malformed inputs
	$(PY) -m pytest -m torture $(PYTEST_ARGS)

aot: $(READY)  ## compile every shipped kernel for every architecture, no GPU needed
	$(PY) tools/compile_kernels.py

docs: $(READY)  ## write docs/configuration.md anew from the configuration's definitions
	$(PY) tools/write_reference.py

check: $(READY)  ## formatting, lint and types, as CI wants them
	$(PY) -m ruff format --check $(CHECKED)
	$(PY) -m ruff check $(CHECKED)
	$(PY) -m mypy

format: $(READY)  ## format the code and repair what lint can
	$(PY) -m ruff format $(CHECKED)
	$(PY) -m ruff check --fix $(CHECKED)

clean:  ## remove .venv, caches and the demo
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
