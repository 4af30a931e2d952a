# make demo and make test work from a fresh clone: each creates the environment, installs what it needs, and runs.

PYTHON ?= python3
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip --quiet --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt Makefile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test bench zoo lint clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1	\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

demo: $(VENV)/.stamp-demo  ## factor a real sentence encoder, print the report and write it as a page
	$(VENV)/bin/lowrank-fx demo

test: $(VENV)/.stamp-test  ## run the tests, without those marked slow
	$(VENV)/bin/python -m pytest -n auto

bench: $(VENV)/.stamp-bench  ## measure accuracy, cost, speed and exports, into benchmarks/results (hours)
	@failed=; for name in accuracy calibration solving sketch scaling ideas speed_ideas layers models peers export backend; do \
	  echo "bench_$$name.py"; $(VENV)/bin/python benchmarks/bench_$$name.py || failed="$$failed bench_$$name.py"; done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed" >&2; exit 1; fi

zoo: $(VENV)/.stamp-test  ## check every architecture of the zoo, into benchmarks/results
	$(VENV)/bin/python benchmarks/bench_zoo.py

lint: $(VENV)/.stamp-lint  ## ruff and mypy --strict
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --strict

clean:  ## remove build outputs and caches; the environment stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, so that what follows finds it installed and no resolver trades its build for another. It
# brings the setuptools that builds lowrank_fx itself, which is why no build needs an isolated environment.
$(VENV)/.stamp-torch: $(INPUTS)
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch into $(VENV) (once)"
	$(PIP) install -c constraints.txt torch
	@touch $@

# Where torch is a build without CUDA, torchvision may not load. The tests define the operators it misses; a demo runs
# without them, and transformers imports torchvision when it is there, so one that does not load is removed.
$(VENV)/.stamp-demo: $(VENV)/.stamp-torch
	@echo "installing the demo into $(VENV)"
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[demo]'
	@if $(PIP) show torchvision > /dev/null 2>&1 && ! $(VENV)/bin/python -c 'import torchvision' 2> /dev/null; then \
	  $(PIP) uninstall --yes torchvision && rm -f $(VENV)/.stamp-test; fi
	@touch $@

# timm requires torchvision, whose own requirements could trade torch for another build.
$(VENV)/.stamp-test: $(VENV)/.stamp-torch
	@echo "installing the tests into $(VENV)"
	$(PIP) install -c constraints.txt --no-deps torchvision
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[test]'
	@rm -f $(VENV)/.stamp-demo
	@touch $@

# The peers that are measured beside, and what draws the charts.
$(VENV)/.stamp-bench: $(VENV)/.stamp-test
	@echo "installing the benchmarks into $(VENV)"
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[demo,bench]'
	@touch $@

# mypy reads the types of what the demo imports, hence that extra.
$(VENV)/.stamp-lint: $(VENV)/.stamp-torch
	@echo "installing the lint tools into $(VENV)"
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[demo,lint]'
	@touch $@
