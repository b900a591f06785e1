# make demo and make test set everything up from nothing in .venv: exact versions, uv bootstrapped through pip.
VENV := .venv
PY := $(VENV)/bin/python
PYTHON ?= python3
LOCK := requirements/cpu.lock
# uv does not read pip's variable; without a folder of wheels of your own, torch's CPU build comes from its index.
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
else
export UV_TORCH_BACKEND ?= cpu
endif
# One build folder per environment: a lock left by a killed build in a shared one would hang every later start.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/$(VENV)/torch_extensions
# Where an image forbids it, each of the tests' many processes would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE
STAMP := $(VENV)/.stamp-$(shell cat $(LOCK) pyproject.toml Makefile | sha256sum | cut -c1-12)

.PHONY: setup demo test test-fast experiments bench lint
setup: $(STAMP)

$(STAMP): $(LOCK) pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --disable-pip-version-check uv==0.13.8
	$(VENV)/bin/uv pip install -q --python $(PY) --no-deps -r $(LOCK)
	$(VENV)/bin/uv pip install -q --python $(PY) --no-deps --no-build-isolation -e .
	rm -f $(VENV)/.stamp-*
	touch $@

# Aligns SmolLM2-135M by WPO on 128 of the shipped pairs; a second call resumes or says that it is complete.
demo: $(STAMP)
	$(VENV)/bin/align train recipe=wpo trainer.max_steps=16 run.dir=runs/demo

# Three workers on two cores: one of them waits for Slurm while the others compute.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -rs -n 3 --dist loadgroup --no-loadscope-reorder -m "not gpu"

# Without what starts engines, clusters or several processes, or takes more than about ten seconds.
test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -rs -n 2 --dist loadgroup --no-loadscope-reorder \
		-m "not gpu and not slow and not vllm and not slurm and not distributed"

# What needs seeds and intervals; writes docs/experiments.
experiments: $(STAMP)
	$(PY) -m tests.experiments.wpo_everyday
	$(PY) -m tests.experiments.multiturn
	$(PY) -m tests.experiments.family
	$(PY) -m tests.experiments.remax_toy
	$(PY) -m tests.experiments.pure_toy
	$(PY) -m tests.experiments.remax
	$(PY) -m tests.experiments.warm --seeds 5 --unprobed 0
	$(PY) -m tests.experiments.overoptimisation --seeds 5
	$(PY) -m tests.experiments.constrained_language
	$(PY) -m tests.experiments.dynamic_language

# DPO and the online update against TRL side by side; writes docs/benchmarks.md and docs/benchmarks_online.md. Others, by
# themselves: $(PY) -m tests.bench.zero_stages (docs/benchmarks_scale.md); on a GPU $(PY) -m tests.bench.gpu_vs_trl.
bench: $(STAMP)
	$(VENV)/bin/uv pip install -q --python $(PY) --no-deps -r requirements/bench.txt
	OMP_NUM_THREADS=1 $(PY) -m tests.bench.dpo_vs_trl
	OMP_NUM_THREADS=1 $(PY) -m tests.bench.online_vs_trl

lint: $(STAMP)
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/basedpyright
