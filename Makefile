# Everything runs in .venv, created from constraints.txt on first use. For another Python: make PYTHON=python3.12 test
PYTHON ?= python3
BIN := .venv/bin
RESULTS ?= bench/output
READY := .venv/ready

.PHONY: help bench bench-peers test test-oldest test-newest plots results publish lint constraints clean

help:  ## Show this help
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

bench: $(READY)  ## Measure every backend; write figures and report.html to bench/output/ (under five minutes)
	$(BIN)/python -m pytest bench/ --benchmark-only $(ARGS)

bench-peers: .venv/peers  ## Install PyTorch and JAX (CPU builds) and compare all packages with the backends
	$(BIN)/python -m bench run head_to_head $(ARGS)

test: $(READY)  ## Run all tests (set MNIST_DIR to include those on MNIST)
	$(BIN)/python -m pytest tests/ $(ARGS)

plots: $(READY)  ## Redraw figures and report from a folder of results into bench/output/ (make plots RESULTS=FOLDER)
	$(BIN)/python -m bench draw $(RESULTS)

test-oldest: RESOLUTION := lowest-direct  ## Run the quick tests with the oldest dependencies that pyproject.toml allows
test-newest: RESOLUTION := highest  ## Run the quick tests with the newest dependencies
test-oldest test-newest:
	$(PYTHON) -m venv --clear .venv-$@
	.venv-$@/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-$@/bin/uv pip install --quiet --python .venv-$@ --resolution $(RESOLUTION) --editable '.[test]'
	.venv-$@/bin/python -m pytest tests/ -m "not slow" $(ARGS)

results: .venv/peers  ## Run all studies, three runs, into bench/results/MACHINE/, to send in (needs MNIST; an hour)
	$(BIN)/python -m bench results $(ARGS)

publish: $(READY)  ## Update the READMEs' tables and figures from all of bench/results/
	$(BIN)/python -m bench publish

lint: $(READY)  ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

constraints: $(READY)  ## Pin the newest versions of all dependencies in constraints.txt
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --extra test --no-annotate --no-header \
	    --upgrade --output-file constraints.txt pyproject.toml

clean:  ## Remove .venv, caches and bench/output/
	rm -rf .venv .venv-* .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks *.egg-info bench/output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	    { echo "Python 3.10 or newer is needed: install it, or pass its name, as in 'make PYTHON=python3.12 $(MAKECMDGOALS)'"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "Python's venv module is missing: install it (on Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

# PyTorch's CPU builds are on its own index; if that is unreachable, the default index is used.
.venv/peers: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[peers]'
	@touch $@
