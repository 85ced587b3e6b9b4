# Everything a contributor or a CI machine runs. `make help` lists it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CODE := lightning_mtl tests examples benchmarks docs

# One thread a process: the tests and the demo are many small matrices, and `compare` runs side by
# side in processes.
export OMP_NUM_THREADS ?= 1
# No window is ever opened.
export MPLBACKEND ?= Agg
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
# Tests start many processes, and each would compile the package anew.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help install lint format types test test-slow test-lowest test-ported docs demo papers cost \
	bench gpu ci clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The stamp is the last thing written, so that an interrupted installation is done again, and a
# finished one is not repeated until pyproject.toml changes. Modules are compiled when they are first
# imported: most never are.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -e ".[dev]"
	touch $@

install: $(INSTALLED)  ## create .venv and install the package with everything it needs (once)

lint: install  ## ruff: rules and formatting
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

format: install  ## let ruff repair what it can
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

types: install  ## mypy, strict, over the package
	$(BIN)/mypy

test: install  ## all fast tests
	$(BIN)/python -m pytest -m "not slow and not gpu" -n auto --dist loadfile \
		--no-loadscope-reorder

test-slow: install test-lowest test-ported  ## the long runs: kills, a browser, other libraries
	$(BIN)/python -m pytest -m slow --ignore tests/ported

# The oldest versions that pyproject.toml admits, in an environment of their own. What they call
# deprecated in one another is not ours to repair. Without torch-geometric, which sets its own bounds.
test-lowest:  ## the fast tests on the oldest supported versions
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet -e . pytest pytest-xdist hypothesis tensorboard \
		scikit-learn matplotlib optuna "torch==2.6.*" "torchvision==0.21.*" "lightning==2.5.0" \
		"pytorch-lightning==2.5.0" "torchmetrics==1.3.*" "jsonargparse[signatures]==4.39.*"
	.venv-lowest/bin/python -m pytest -m "not slow and not gpu" -n auto --dist loadfile \
		--no-loadscope-reorder --ignore-glob "tests/examples/*molecules*" -W ignore::DeprecationWarning

# Modules of other libraries, which have an environment of their own: the one for `make ci` stays
# small, and their requirements cannot hold back its versions.
test-ported:  ## modules of other libraries, ported
	$(PYTHON) -m venv .venv-ported
	.venv-ported/bin/python -m pip install --quiet -e ".[ported,vision]" pytest matplotlib
	.venv-ported/bin/python -m pytest tests/ported

docs: install  ## build the pages (warnings are errors) and run their examples
	$(BIN)/python -m sphinx -W --keep-going -q -d docs/_build/read -b html docs docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -q -d docs/_build/read -b doctest docs docs/_build/doctest

demo: install  ## two digits, balancers and rivals, three seeds; report in demo_results/
	$(BIN)/lightning-mtl compare --config examples/digits/compare.yaml \
		--balancers examples/digits/balancers.yaml --seeds 3 --workers 2 --split test \
		--out demo_results

# Logic gates as published; two digits with settings under which a run takes seconds, three rates.
papers: install  ## tables of the papers that take minutes; results in papers_results/
	$(BIN)/python -m examples.logic_gates.tables --out papers_results/logic_gates
	$(BIN)/python -m examples.digits.grid --out papers_results/digits --seeds 1 \
		--config examples/digits/compare.yaml --balancers examples/digits/table5.yaml \
		--rates 0.001 0.002 0.005

cost: install  ## fail when a step costs more, beside plain training, than it did
	$(BIN)/python benchmarks/check.py

bench: install  ## every figure of the documentation that is a time or a memory
	for name in cost cheaper stale memory growth overhead where solvers ranks; do \
		$(BIN)/python benchmarks/$$name.py || exit 1; done

# With the Python that it is called with, which has torch for the GPU: nothing is installed or fetched.
GPU_FLAGS ?=
gpu:  ## tests and times on an NVIDIA GPU, ten minutes at most; results in gpu.json
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py $(GPU_FLAGS)

# Types and pages take one core each, the tests all, and times are taken when nothing else runs.
ci: lint  ## what CI runs
	$(MAKE) --jobs 2 --output-sync types docs
	$(MAKE) test
	$(MAKE) cost

clean:  ## remove what builds and runs wrote; the environment stays
	rm -rf build dist docs/_build demo_results papers_results .mypy_cache .pytest_cache \
		.ruff_cache .hypothesis
