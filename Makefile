# make demo | test | lint | bench | kernels | gpu-check | train ...  Everything runs in .venv, which `install` makes.
#
# TORCH_INDEX: where torch comes from. Empty: PyPI, whose Linux build runs on CUDA and CPU machines alike, but is large.
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu     the small CPU-only build
VENV ?= .venv
PYTHON ?= python3
TORCH_INDEX ?=
PY := $(VENV)/bin/python
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: install demo test test-full lint bench kernels gpu-check wheel train measure clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(PY) -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	$(PY) demo.py

# One worker a processor, of one thread each; `make test-full` runs every scorer with every level on every architecture.
test: install
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist loadfile

test-full: install
	OMP_NUM_THREADS=1 KVZIP_TEST_FULL=1 $(PY) -m pytest -n auto --dist loadfile

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: install
	$(PY) benchmarks/bench_decode_attention.py
	$(PY) benchmarks/bench_quantized.py
	$(PY) benchmarks/bench_generate.py
	$(PY) benchmarks/bench_scoring.py
	$(PY) benchmarks/bench_scoring_memory.py
	$(PY) benchmarks/bench_blocks.py

# Compiles the C++ and, with nvcc, the CUDA kernels into the cache folder; otherwise the first use does.
kernels: install
	$(PY) -c "from kvzip.attention.build import build_all; build_all()"

# On a CUDA machine: builds, checks against float64, runs compute-sanitizer and the GPU benchmarks.
gpu-check: install
	$(PY) -m tools.gpu_check

wheel: install
	$(PY) -m build --wheel

# Trains the bundled model again (goes on from checkpoints/ if there are any), and measures it.
train: install
	$(PY) -m tools.train_bundled --workers 2

measure: install
	$(PY) -m tools.measure_bundled
	$(PY) -m tools.frontier
	$(PY) -m tools.scorer_table

clean:
	rm -rf $(VENV) build dist *.egg-info
