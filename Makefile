# Two commands do everything on a fresh clone: `make demo` and `make test`. Needs python3 (3.11 or newer) and nothing else.
# Another interpreter: `make PYTHON3=python3.12 demo`.

PYTHON3 ?= python3
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
TRITON := .cache/triton
PACKAGES := common decode_worker deploy prefill_worker router transfer

.PHONY: setup demo test check bench clean

setup: $(STAMP)

# torch first, alone and at its pinned version: where this machine offers a build for the CPU, that one is taken and kept.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON3) -c 'import sys; sys.exit("error: Tandem needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	test -x $(PYTHON) || $(PYTHON3) -m venv $(VENV)
	@echo "installing into $(VENV); this takes some minutes the first time"
	$(PYTHON) -m pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(PYTHON) -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(PYTHON) -m deploy.demo

# Triton's interpreter runs the GPU kernels on a CPU. It has a folder of its own: where it is installed, torch imports it everywhere.
$(TRITON)/.installed: | $(STAMP)
	$(PYTHON) -m pip install --quiet --no-deps --upgrade --target $(TRITON) triton==3.9.0
	touch $@

test: setup $(TRITON)/.installed
	$(PYTHON) -m pytest

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --strict $(PACKAGES)
	$(VENV)/bin/mypy tests
	$(VENV)/bin/lint-imports

bench: setup
	$(PYTHON) -m deploy.bench

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
