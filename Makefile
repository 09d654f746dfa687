# make run     set up what is missing, then the main job on the bundled model
# make test    set up what is missing, then format, lint, types and the whole test suite, on the CPU
# make check   the quick half of that: format, lint, types, and the tests that need nothing (a minute or two)

PYTHON ?= python3
VENV   ?= .venv
BESIDE  = -n 2 --dist loadfile
ALONE   = alone or gpu or gpu2
PIP     = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: run test check lint setup clean

run: $(VENV)/.ready
	$(VENV)/bin/python main.py -b 4 -l 100 -o test.txt

# Two files at a time; what measures, or needs a GPU, wants the machine for itself and comes last.
test: lint
	$(VENV)/bin/python -m pytest -q $(BESIDE) tests/pure tests/torch
	$(VENV)/bin/python -m pytest -q $(BESIDE) -m "not ($(ALONE))" tests/cluster tests/gpu
	$(VENV)/bin/python -m pytest -q -m "$(ALONE)" tests/cluster tests/gpu

check: lint
	$(VENV)/bin/python -m pytest -q $(BESIDE) tests/pure

lint: $(VENV)/.ready-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy --strict --cache-dir .mypy_cache/strict $(STRICT)
	$(VENV)/bin/mypy $(TYPED)

STRICT = main.py server.py prompts.py router prefill_worker/worker.py decode_worker/worker.py decode_worker/batching.py \
         sampler baton/cli baton/client baton/cluster baton/kv baton/offline baton/server baton/wire \
         $(filter-out $(OVER_TORCH),$(wildcard baton/*.py))
OVER_TORCH = baton/__init__.py baton/api.py baton/llm.py baton/local.py
TYPED  = baton prefill_worker decode_worker tools

setup: $(VENV)/.ready

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version); try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready: requirements.txt | $(VENV)/bin/python
	$(PIP) --only-binary :all: -r requirements.txt
	@touch $@

$(VENV)/.ready-dev: requirements-dev.txt requirements.txt $(VENV)/.ready
	$(PIP) --only-binary :all: -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis test.txt test.txt.part
