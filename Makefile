# make train: from a fresh clone to a trained tiny MoE.   make test: every test that needs no GPU.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
TORCH ?= torch==2.13.0
JOBS ?= 2
PARALLEL = -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: install train train-sglang test test-slurm test-gpu bench-gpu parity lint test-py312 clean

install: $(VENV)/.installed

# The index's CPU build of this torch wins where it offers one; elsewhere PyPI's CUDA build comes, which also runs on a CPU.
$(VENV)/.installed: setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "megasapo needs python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q '$(TORCH)'
	$(PY) -m pip install -q -e '.[dev]'
	touch $@

train: install
	$(PY) examples/arithmetic/run.py

# The same example with a real SGLang (its own environment, on the CPU) as the rollout server.
train-sglang: install
	bash tests/sglang/setup.sh
	$(PY) examples/arithmetic/run.py --out examples/arithmetic/out-sglang rollout.engine=sglang \
	  'rollout.spawn_command=[bash, tests/sglang/launch.sh, "{model}", "{port}", "{api_key_file}", --dtype, float32, --max-running-requests, "64"]'

# A file of tests runs in one process from beginning to end, and the long ones are started first; JOBS=0 for one process.
test: install
	bash tests/sglang/setup.sh
	OMP_NUM_THREADS=1 $(PY) -m pytest -m 'not gpu and not slurm' $(PARALLEL) $(ARGS)

# Whole runs by sbatch on a real Slurm, whose three nodes this machine plays; needs root, and apt for the first time.
test-slurm: install
	tests/slurm/sandbox.sh install
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slurm tests/slurm $(ARGS)

# On a machine with a GPU, in an environment that has what docs/gpu.md names; GPU_PY is its python.
GPU_PY ?= python3
test-gpu:
	$(GPU_PY) -m pytest -m gpu tests/gpu -p no:cacheprovider $(ARGS)

bench-gpu:
	$(GPU_PY) -m benchmarks.gpu $(ARGS)

# The whole matrix of docs/numerics.md: prints its table and writes it there.
parity: install
	$(PY) -m tests.dist.test_parity write

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The same learner on megatron-core 0.19 (python 3.12 or newer resolves to it).
test-py312:
	$(MAKE) install VENV=.venv312 PYTHON=$(PYTHON312)
	OMP_NUM_THREADS=1 .venv312/bin/python -m pytest tests/dist tests/unit -m 'not gpu and not slow' $(PARALLEL) $(ARGS)

clean:
	rm -rf .venv .venv312 .venv-sglang build *.egg-info runs examples/arithmetic/out examples/arithmetic/out-sglang
