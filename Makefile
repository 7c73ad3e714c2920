# `make demo` and `make test` set themselves up on a machine with Python 3.10 or newer and a C compiler.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

# The quick tests run on all cores, and what PYTEST_ARGS selects in their place runs one by one.
PYTEST_ARGS ?= --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: demo test gpu lint docs clean

demo: $(READY)
	@$(VENV)/bin/dist-pca demo

test: $(READY)
	@$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

# Everything that needs a GPU, in nine minutes: tests, benches, a short run, and a record of them.
gpu: $(READY)
	@$(VENV)/bin/dist-pca bench gpu $(GPU_ARGS)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python tests/language.py

# The manual as a site, in site/.
docs: $(READY)
	$(VENV)/bin/python -m dist_pca.tools.manual docs
	$(VENV)/bin/mkdocs build --strict

$(READY): pyproject.toml
	@echo "setting up $(VENV): PyTorch, DeepSpeed and what they need, several GB"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --upgrade pip
	@$(VENV)/bin/python -m pip install --quiet --editable '.[demo,dev]'
	@touch $@

clean:
	rm -rf $(VENV) runs/demo build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
