# Everything from a bare checkout. `make demo PYTHON=python3.12` names another interpreter.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
JOBS   ?= 2
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Written last, so an environment without it was never finished and is made anew. Only .venv is ever emptied: an
# environment that VENV names may be somebody's own.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@test -e $@ || $(PYTHON) -m venv $(if $(filter .venv,$(VENV)),--clear) $(VENV)
	@rm -f $@
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test,docs,dev]'
	@touch $@

.PHONY: help
help: ## say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: $(STAMP) ## install, and run the demo (about a minute); ARGS='--omega 1' adds options
	$(BIN)/mosaic run $(ARGS)

.PHONY: test
test: $(STAMP) ## install, and run the tests, JOBS at once; ARGS='-k cli' picks some
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

.PHONY: test-all
test-all: $(STAMP) ## the slow tests too
	$(BIN)/python -m pytest -m 'not gpu and not cluster' $(ARGS)

.PHONY: test-cluster
test-cluster: $(STAMP) ## a real `ray up`; needs root, iproute2, openssh-server, rsync
	$(BIN)/python -m pytest -m cluster $(ARGS)

# Without $(STAMP): a machine with a GPU may have no network. The environment's Python, unless PYTHON names another.
.PHONY: gpu-check
gpu-check: ## tests and measurements on a GPU, under 8 minutes; writes benchmarks/gpu.json
	$(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON)) benchmarks/gpu.py $(ARGS)

.PHONY: bench
bench: $(STAMP) ## what Mosaic adds to the work itself, on CPUs (an hour and a half, nothing beside it); writes benchmarks/bench.json
	$(BIN)/python benchmarks/bench.py $(ARGS)

.PHONY: lint
lint: $(STAMP) ## style, and which folder imports which
	$(BIN)/ruff check .
	$(BIN)/lint-imports

.PHONY: types
types: $(STAMP) ## check the types
	$(BIN)/mypy

.PHONY: docs
docs: $(STAMP) ## build site/: the documentation, any warning fails
	$(BIN)/python docs/write_pages.py
	$(BIN)/python -m mkdocs build --strict $(ARGS)

.PHONY: docs-serve
docs-serve: $(STAMP) ## show it at http://127.0.0.1:8000, and again when a page changes
	$(BIN)/python docs/write_pages.py
	$(BIN)/python -m mkdocs serve $(ARGS)

.PHONY: gallery
gallery: $(STAMP) ## the three reports of the documentation's gallery again (a minute or two)
	$(BIN)/python docs/write_pages.py --gallery

.PHONY: notebooks
notebooks: $(STAMP) ## run examples/*.ipynb and keep what their cells show
	$(BIN)/python docs/run_notebooks.py

.PHONY: picture
picture: $(STAMP) ## the picture of a report in README.md; needs Chromium
	$(BIN)/python docs/picture.py

.PHONY: wheel
wheel: $(STAMP) ## build dist/: wheel and sdist, checked; the versions it was tested with, cli.py
	rm -rf dist
	$(BIN)/python -m build --sdist --wheel --no-isolation
	$(BIN)/python -m twine check --strict dist/*
	cp constraints.txt cli.py dist/

# All extras but those of trackio, which takes no pillow as new as constraints.txt has.
LOCKED := aws dev docs fid gcp hf mlflow onnx test wandb

.PHONY: lock
lock: $(STAMP) ## write pylock.toml: the files and hashes of the versions in constraints.txt, from your index
	$(BIN)/python -m uv pip compile pyproject.toml $(LOCKED:%=--extra %) -c constraints.txt --universal --python-version 3.11 \
		--custom-compile-command 'make lock' --quiet --output-file pylock.toml

.PHONY: clean
clean: ## remove built files, but not results in mosaic_runs/
	rm -rf .venv build dist site docs/gallery docs/notebooks docs/reference .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
