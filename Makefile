# Everything a learner or a contributor runs. `make` alone lists the targets.
SHELL := /bin/sh
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/ready
BITSANDBYTES := $(VENV)/bitsandbytes
JOBS ?= 2
PROMPT ?= a large shiny red sphere left of a small blue cube on a wooden floor
SEED ?= 0
LESSON ?= notebooks/00_welcome.ipynb

# One thread for each test process: JOBS of them already fill the machine. No test may reach a model hub, or the user's progress file.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 FLUX_LAB_PROGRESS=
PYTEST := $(TEST_ENV) $(PY) -m pytest

.PHONY: help setup lab demo bench check test lint notebooks stale clean FORCE

help: ## list these targets
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1|\2/p' Makefile | while IFS='|' read -r name text; do printf '%-12s %s\n' "$$name" "$$text"; done
	@echo
	@echo "Set-up takes PYTHON= (an interpreter, 3.11 or newer) and TORCH_INDEX= (where pip finds torch)."
	@echo "On Linux a plain torch is the CUDA build, several GB; TORCH_INDEX=<PyTorch's CPU index, see pytorch.org> avoids that."

# ---- set-up -------------------------------------------------------------------------------------------------------------

setup: $(READY) ## make .venv with everything in it, at the versions of constraints.txt

# The stamp holds the folder it was made in: a moved or copied .venv, or one whose Python is gone, is made again.
STAMPED := $(shell $(PY) -c '' 2>/dev/null && cat $(READY) 2>/dev/null)
ifneq ($(STAMPED),$(CURDIR))
$(READY): FORCE
endif

$(READY): pyproject.toml constraints.txt
	@stop() { \
	    printf '\nSet-up stopped: %s\n' "$$1"; \
	    echo "When that is put right, run the same command again; what is already installed is kept."; \
	    exit 1; \
	} >&2; \
	recent='import sys; sys.exit(sys.version_info < (3, 11))'; \
	python=; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",python3.11 python3 python python3.12 python3.13); do \
	    if "$$candidate" -c "$$recent" 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	[ -n "$$python" ] || stop "$(if $(PYTHON),$(PYTHON) is not a Python of version 3.11 or newer,no Python 3.11 or newer was found; install one or name it with PYTHON=/path/to/python3.11)."; \
	made_in=$$(cat $(READY) 2>/dev/null); rm -f $(READY); \
	if ! $(PY) -c "$$recent; import pip" 2>/dev/null || [ -n "$$made_in" -a "$$made_in" != "$(CURDIR)" ]; then \
	    echo "Making $(VENV) with $$($$python --version)"; \
	    "$$python" -m venv --clear $(VENV) || stop "$$python cannot make a virtual environment (on Debian and Ubuntu: install the package python3-venv)."; \
	fi; \
	torch=$$(sed -n '/^torch==/p' constraints.txt); \
	if [ -z "$(TORCH_INDEX)" ]; then from=; else from="--no-deps --index-url $(TORCH_INDEX)"; fi; \
	echo "Installing $$torch$(if $(TORCH_INDEX), from $(TORCH_INDEX))"; \
	$(PY) -m pip install -q -c constraints.txt $$from "$$torch" \
	    || stop "pip could not install $$torch. Its reason is above; the usual ones are no network, a full disk, or a Python that torch has no build for."; \
	echo "Installing the rest (a few minutes the first time)"; \
	$(PY) -m pip install -q -c constraints.txt "$$torch" -e '.[dev]' \
	    || stop "pip could not install the packages of pyproject.toml. Its reason is above; the usual ones are no network or a full disk."; \
	$(PY) -m pip install -q -c constraints.txt --no-deps open_clip_torch \
	    || stop "pip could not install open_clip_torch, from which a test reads CLIP's vocabulary."; \
	$(PY) -c 'import torch' || stop "torch was installed but does not start. Its reason is above."; \
	echo "$(CURDIR)" > $(READY); \
	echo "Ready: $(VENV)"

# ---- for learners -------------------------------------------------------------------------------------------------------

lab: setup ## set up if needed, then open lesson 00 in JupyterLab
	$(PY) -m jupyterlab $(LESSON) $(shell [ "$$(id -u)" = 0 ] && echo --allow-root)

demo: setup ## draw PROMPT= and a film strip of its steps into outputs/
	$(PY) -m flux_lab generate "$(PROMPT)" --seed $(SEED) --out outputs/demo.png --filmstrip outputs/demo_steps.png

bench: setup ## time ours, the fast path and diffusers side by side; BENCH= takes options such as --only step
	$(PY) -m flux_lab bench --json outputs/bench.json $(BENCH)
	$(PY) -m flux_lab.inference.benchmark_report outputs/bench.json

# ---- for contributors ---------------------------------------------------------------------------------------------------

lint: setup ## ruff: lint and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

check: lint ## lint and the quick tests, under two minutes
	$(PYTEST) -n $(JOBS) --dist worksteal -m "not slow and not browser"

test: lint $(BITSANDBYTES) ## everything: all tests, every notebook, JupyterLab in a browser
	$(PYTEST) -n $(JOBS) --dist worksteal -m "not browser"
	PYTHONPATH=$(BITSANDBYTES) $(PYTEST) tests/test_inference_int8.py tests/test_inference_nf4.py tests/test_inference_bitsandbytes_layers.py
	$(if $(wildcard notebooks/*.ipynb),$(PYTEST) --nbval-lax --nbval-current-env --nbval-cell-timeout=300 -n $(JOBS) --dist loadscope notebooks)
	$(PYTEST) -n $(JOBS) --dist load -m browser tests/browser

# The reference for quantized layers. It stands apart from all else: where diffusers finds it, every notebook says so in its output.
$(BITSANDBYTES): constraints.txt | $(READY)
	$(PY) -m pip install -q --upgrade --no-deps --target $@ "$$(sed -n '/^bitsandbytes==/p' constraints.txt)"
	@touch $@

notebooks: setup ## build and run the notebooks whose source changed
	$(PY) notebooks/build.py

stale: setup ## name the notebooks that are older than their source
	$(PY) notebooks/build.py --check

clean: ## remove outputs and caches; .venv is kept
	rm -rf outputs build dist .pytest_cache .ruff_cache
	find . -name .venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -prune -exec rm -rf {} +
