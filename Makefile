# make run     set up what is missing, then the main job on the bundled model
# make test    set up what is missing, then format, lint, types and the whole test suite, on the CPU
# make test-avx2, test-sse, test-nocompiler
#              the tests that compute, as a CPU with AVX2 alone, with neither, and with no C++ compiler
# make test-arm64   native code compiled for arm64, its numbers checked under qemu-user; needs Debian's
#              g++-aarch64-linux-gnu and qemu-user, and says so; a minute or two
# make tsan    native code under the thread sanitizer;  make asan: under those of addresses and undefined behaviour
# make check   the quick half of that: format, lint, types, and the tests that need nothing (a minute or two)
# make faults  the reliability battery, under half an hour on two cores: docs/faults.md and the README's table
#              FAULTS="--only F2 --scale 0.1 --seed 7" for a part of it
# make families   every causal language model that transformers knows, tiny, against transformers: docs/models.md
#              FAMILIES="phi3 olmo" for a part of it
# make wheel   dist/: the sdist, and the wheel made from it
# make test-ray   `serve --cluster ray` on a real Ray cluster of three nodes here; ray goes into .venv-ray, a few minutes
# make test-nixl  KV by NIXL, between processes here; nixl goes into .venv-nixl, a minute
# make test-triton  the GPU's attention kernels, interpreted or on the GPU that is here; .venv-triton, minutes
# make test-deep  tests/pure, tests/torch and the fuzzing of the API, as deep as they go; `make test` tries a part
# make test-lab   the lab's large studies with real clusters, which `make test` leaves out; two minutes
# make test-otel  traces by OTLP, to a stand-in for a collector; the exporter goes into .venv-otel, a minute
# make test-axe   the page under axe-core, from npm, in Debian's chromium; 3 minutes
# make docs    site/: the documentation as a site, with the API; its tools go into .venv-docs
# make coverage   which lines of the product the tests reach, processes started by tests left out; htmlcov/

PYTHON ?= python3
VENV   ?= .venv
# Three files at a time: on two cores, one of three mostly waits for processes. tests/order.py says which begin.
BESIDE  = -n 3 --dist loadfile --no-loadscope-reorder
GPU     = gpu or gpu2
CARD    = $(wildcard /dev/nvidia[0-9]*)
COMMANDS = tests/cluster/test_main_command.py tests/cluster/test_generate.py
PIP     = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: run test test-avx2 test-sse test-nocompiler test-arm64 test-ray test-nixl test-triton test-otel test-axe test-deep test-lab check lint families faults tsan asan setup wheel docs coverage clean

run: $(VENV)/.ready
	$(VENV)/bin/python main.py -b 4 -l 100 -o test.txt

# What needs a GPU wants it for itself and comes last; without one it is skipped among the others.
test: lint
	$(VENV)/bin/python -m pytest -q $(BESIDE) $(if $(CARD),-m "not ($(GPU))") \
	  tests/pure tests/torch tests/cluster tests/gpu tests/triton/test_triton_attention.py
	$(if $(CARD),$(VENV)/bin/python -m pytest -q -m "$(GPU)" tests/gpu)

# What torch, oneDNN, MKL and the native code may use; docs/architecture.md.
test-avx2: AS = ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
                CXX="c++ -march=x86-64-v3"
test-sse: AS = ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 \
               CXX="c++ -march=x86-64-v2"
test-nocompiler: AS = CXX=/nonexistent/c++

test-avx2 test-sse test-nocompiler: $(VENV)/.ready-dev
	$(AS) $(VENV)/bin/python -m pytest -q -rs $(BESIDE) tests/torch
	$(AS) $(VENV)/bin/python -m pytest -q -rs $(BESIDE) -m "not ($(GPU))" $(COMMANDS)

test-arm64: $(VENV)/.ready
	$(VENV)/bin/python -m tests.torch.emulated

# Environments of their own that see the packages of the first, so that nothing is installed twice.
test-ray: $(VENV)-ray/.ready
	$(VENV)-ray/bin/python -m pytest -q tests/ray

test-nixl: $(VENV)-nixl/.ready
	$(VENV)-nixl/bin/python -m pytest -q tests/torch/test_transfer_nixl.py tests/torch/test_transfer_contract.py \
	  tests/cluster/test_by_hand.py -k "nixl or transfer"

test-triton: $(VENV)-triton/.ready
	$(VENV)-triton/bin/python -m pytest -q $(BESIDE) tests/triton

test-otel: $(VENV)-otel/.ready
	$(VENV)-otel/bin/python -m pytest -q tests/otel

# axe-core is a program for browsers, so it comes from npm; npm compares its checksum.
AXE_CORE = axe-core@4.14.1
test-axe: $(VENV)/.ready-dev
	rm -rf $(VENV)-axe && mkdir $(VENV)-axe
	cd $(VENV)-axe && npm pack --silent $(AXE_CORE) && tar xzf axe-core-*.tgz package/axe.min.js
	AXE=$(abspath $(VENV)-axe)/package/axe.min.js $(VENV)/bin/python -m pytest -q tests/axe

test-deep: $(VENV)/.ready-dev
	BATON_TESTS=deep $(VENV)/bin/python -m pytest -q $(BESIDE) tests/pure tests/torch tests/cluster/test_http.py

test-lab: $(VENV)/.ready-dev
	$(VENV)/bin/python -m pytest -q tests/lab

EXTRA_ENVIRONMENTS = $(VENV)-ray/.ready $(VENV)-nixl/.ready $(VENV)-triton/.ready $(VENV)-otel/.ready
$(EXTRA_ENVIRONMENTS): $(VENV)-%/.ready: requirements-%.txt $(VENV)/.ready
	$(VENV)/bin/python -m venv $(VENV)-$*
	$(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$($(VENV)-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth
	$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: -r requirements-$*.txt
	@touch $@

check: lint
	$(VENV)/bin/python -m pytest -q $(BESIDE) tests/pure

lint: $(VENV)/.ready-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy --strict --cache-dir .mypy_cache/strict $(STRICT)
	$(VENV)/bin/mypy $(TYPED)

STRICT = main.py server.py prompts.py router prefill_worker/worker.py prefill_worker/model.py decode_worker/worker.py \
         decode_worker/batching.py decode_worker/upstream sampler \
         baton/adapters baton/checkpoints baton/cli baton/client baton/cluster baton/gguf baton/kv baton/offline baton/plan baton/quantized baton/server baton/wire \
         $(filter-out $(OVER_TORCH),$(wildcard baton/*.py))
OVER_TORCH = baton/__init__.py baton/api.py baton/llm.py baton/local.py
TYPED  = baton prefill_worker decode_worker tools

families: $(VENV)/.ready-dev
	$(VENV)/bin/python -m tests.torch.matrix --write $(FAMILIES)

faults: $(VENV)/.ready
	$(VENV)/bin/python -m tools.faults $(FAULTS)

# build/ is removed first: setuptools would put what an earlier build left there into the wheel.
wheel: $(VENV)/.ready
	rm -rf build *.egg-info
	$(VENV)/bin/python -c 'from setuptools import build_meta as b; print(b.build_sdist("dist")); print(b.build_wheel("dist"))'
	rm -rf build *.egg-info

# Strict: a broken link or anchor, or a document that the navigation lacks, is an error.
docs: $(VENV)-docs/.ready
	$(VENV)-docs/bin/mkdocs build --strict --quiet

$(VENV)-docs/.ready: requirements-docs.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: -r requirements-docs.txt
	@touch $@

coverage: $(VENV)/.ready-dev
	$(VENV)/bin/python -m pytest -q $(BESIDE) $(addprefix --cov=,$(PRODUCT)) --cov-report=term:skip-covered --cov-report=html \
	  -m "not ($(GPU))" tests/pure tests/torch tests/cluster

PRODUCT = baton router prefill_worker decode_worker sampler prompts

# The native test program (docs/sanitizers.md); any report makes it fail.
NATIVE_TEST = tests/torch/native_stress.cpp
SANITIZED   = -std=c++20 -O1 -g -fno-omit-frame-pointer -Wno-psabi -march=native -pthread

tsan:
	@mkdir -p build
	$(CXX) $(SANITIZED) -fsanitize=thread -o build/native_tsan $(NATIVE_TEST)
	TSAN_OPTIONS=halt_on_error=1 build/native_tsan

asan:
	@mkdir -p build
	$(CXX) $(SANITIZED) -fsanitize=address,undefined -fno-sanitize-recover=all -o build/native_asan $(NATIVE_TEST)
	build/native_asan

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
	rm -rf $(VENV) $(VENV)-ray $(VENV)-nixl $(VENV)-triton $(VENV)-otel $(VENV)-docs site .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov build dist *.egg-info test.txt test.txt.part
