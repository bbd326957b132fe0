# The names that people and CI call. Everything runs in .venv, which is made on first use.
PYTHON ?= python3
PY := .venv/bin/python
STAMP := .venv/.installed
LABEL := .venv-label

.DEFAULT_GOAL := help
.PHONY: help install demo test test-label lint format bench clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null || true

install: $(STAMP) ## make .venv with the tested versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "make: Python 3.10 or newer is needed, got " + sys.version.split()[0] + "; call make PYTHON=python3.x")'
	@echo "make: installing into .venv (once)"
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP) ## sharpen a thick-slice brain MRI, a retina and a stereo pair, from file to figure
	@$(PY) docs/demo/mni152.py
	@echo
	@$(PY) docs/demo/retina.py
	@echo
	@$(PY) docs/demo/stereo.py

test: $(STAMP) ## all tests and all docstring examples
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist=loadfile --doctest-modules tests common/medsr

test-label: $(LABEL)/.installed ## bundles in MONAI Label, in an environment of its own
	@OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/integrations/monailabel/shims $(LABEL)/bin/python -m pytest -q tests/label

$(LABEL)/.installed: pyproject.toml constraints.txt $(wildcard integrations/monailabel/*.txt)
	@echo "make: installing MONAI Label into $(LABEL) (once)"
	@test -x $(LABEL)/bin/python || $(PYTHON) -m venv $(LABEL)
	@$(LABEL)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-r integrations/monailabel/requirements.txt -e ".[itk]"
	@$(LABEL)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps monailabel==0.8.5
	@touch $@

lint: $(STAMP) ## style, formatting, bundle JSON, types
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --quiet --check .
	@$(PY) tools/format_json.py --check bundles/*/configs
	@$(PY) -m mypy --no-error-summary

format: $(STAMP) ## rewrite Python and bundle JSON in the house style
	@$(PY) -m ruff check --quiet --fix .
	@$(PY) -m ruff format --quiet .
	@$(PY) tools/format_json.py bundles/*/configs

bench: $(STAMP) ## speed and quality, baselines beside them in the same run
	@$(PY) -m benchmarks.speed.slice_sr
	@$(PY) -m benchmarks.speed.image_sr
	@$(PY) -m benchmarks.speed.stereo_sr
	@$(PY) -m benchmarks.quality.superres
	@$(PY) -m benchmarks.quality.fundus
	@$(PY) -m benchmarks.quality.sisr
	@$(PY) -m benchmarks.quality.stereo

clean: ## remove environments, caches and the demo's outputs; trained weights below runs/ stay
	@rm -rf .venv $(LABEL) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist demo common/*.egg-info
	@find common tests tools docs benchmarks integrations -name __pycache__ -type d -prune -exec rm -rf {} +
