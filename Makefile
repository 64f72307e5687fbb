# make demo   from nothing to a running demo          make check   everything that a change must pass
# make test   the tests                               make help    all targets

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PY := $(VENV)/bin/python
TORCH ?= $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
# Two workers, one thread each: as fast as the tests get on two cores. For one test: make test PYTEST="-k name"
PYTEST ?= -n 2 --dist loadgroup
DRIFT ?= .venv-drift

.DEFAULT_GOAL := help
.PHONY: help demo test test-long check format format-check lint types examples nightly fuzz mutants recall drift compile-time docs wheel clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# A stamp says what an environment holds, so that nothing is installed twice; it ages with the files that decide.
$(VENV)/.stamp-demo: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	# torch first and alone: the index decides which build of it this machine gets
	$(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet -c constraints.txt -e ".[demo]"
	touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-demo
	$(PY) -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.stamp-demo ## make an environment and run `attnpass demo`
	$(VENV)/bin/attnpass demo

test: $(VENV)/.stamp-dev ## run the tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" --durations=25 $(PYTEST)

test-long: $(VENV)/.stamp-dev ## run those that `make test` leaves out: slow ones, and many of one kind
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow --durations=25 $(PYTEST)

check: format-check lint types test examples ## format, lint, types, tests, examples

format: $(VENV)/.stamp-dev ## format the code in place
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

format-check: $(VENV)/.stamp-dev
	$(PY) -m ruff format --check .

lint: $(VENV)/.stamp-dev ## look for mistakes
	$(PY) -m ruff check .

types: $(VENV)/.stamp-dev ## check the types
	$(PY) -m mypy

examples: $(VENV)/.stamp-dev ## run every example, and look at what it says
	OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/test_examples.py

nightly: $(VENV)/.stamp-dev ## check 20,000 random programs that make masks
	ATTNPASS_MASK_EXAMPLES=20000 OMP_NUM_THREADS=1 $(PY) -m pytest -q tests/masks/test_programs.py tests/masks/test_attention_programs.py

# ATTNPASS_FUZZ_EXAMPLES, _SEED, _WORKERS, _DEVICE, _FOLDER: tests/fuzz/__main__.py
fuzz: $(VENV)/.stamp-dev ## check 20,000 random attention programs, whole and damaged; saves what fails in build/fuzz
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz

mutants: $(VENV)/.stamp-dev ## break the pass on purpose in many ways: the tests must notice each
	OMP_NUM_THREADS=1 $(PY) -m tests.mutants

recall: $(VENV)/.stamp-dev ## measure which attention is found in transformers, timm and diffusers
	@set -e; for suite in transformers timm diffusers; do $(PY) -m benchmarks.recall --suite $$suite; done

# newest, whatever constraints.txt says; where torch comes with CUDA libraries these are gigabytes, and a CPU does
drift: ## run the tests, and models, with the newest torch, transformers, timm and diffusers
	test -x $(DRIFT)/bin/python || $(PYTHON) -m venv $(DRIFT)
	$(DRIFT)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager torch torchvision transformers timm diffusers
	$(DRIFT)/bin/python -m pip install --quiet -e ".[dev]"
	$(DRIFT)/bin/python -m pip list 2>/dev/null | grep -iE '^(torch|torchvision|transformers|timm|diffusers) '
	OMP_NUM_THREADS=1 $(DRIFT)/bin/python -m benchmarks.recall --check --every 4
	OMP_NUM_THREADS=1 $(DRIFT)/bin/python -m pytest -m "not slow" $(PYTEST)

compile-time: $(VENV)/.stamp-dev ## measure what the pass adds to compile time
	$(PY) -m benchmarks.compile_time

docs: $(VENV)/.stamp-dev ## generate docs/reasons.md
	$(PY) -m attnpass.reasons > docs/reasons.md.new
	mv docs/reasons.md.new docs/reasons.md

wheel: $(VENV)/.stamp-demo ## build dist/*.whl
	$(PY) -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls -1 dist/*.whl

clean: ## remove what was built (the environment stays)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
