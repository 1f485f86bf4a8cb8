# Set-up lives in $(VENV): made if it is missing, used as it is if it is yours (make VENV=~/my-env).
# A PyTorch that is already installed there is kept, CUDA build or not, as long as it is new enough.
VENV ?= .venv
PYTHON ?= python3
# The build of PyTorch: auto (by the driver of a GPU, as uv finds it), cpu, cu130, rocm7.1 ...
TORCH ?= auto
EXTRAS ?= dev
BIN := $(VENV)/bin
READY := $(VENV)/.vae-hyperband-ready$(if $(filter-out dev,$(EXTRAS)),-$(EXTRAS))
WORKERS ?= 2
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(READY).constraints
# Tests that share what takes long to make are one group, for one of the processes.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help setup data run demo test faults soak browser-test slurm-test lint docs wheel reproduce best bench notebook clean

help:  ## Show this list
	@echo "make setup   make $(VENV) with the tested set of packages; the others do so by themselves"
	@echo "make run     set up, search, train the best configuration, evaluate it, draw figures"
	@echo "make demo    the same on synthetic garments, without any download, in a few minutes"
	@echo "make test    set up, run the tests"
	@echo "make faults  run the slow tests, most of which kill real processes"
	@echo "make soak MINUTES=60  random runs under random faults, for that long"
	@echo "make browser-test  look at the pages in a real Chromium; root may install it"
	@echo "make slurm-test  run slurm_job.sh on a real Slurm on this machine; root may install it"
	@echo "make lint    check format, style and types"
	@echo "make docs    build the documentation as a site, in site/"
	@echo "make wheel   build the package for pip, in dist/"
	@echo "make data    fetch Fashion-MNIST (mirrors, else the system's package) and check it"
	@echo "make notebook  execute model.ipynb and store its outputs"
	@echo "make reproduce  train and evaluate many models, for docs/results.json (hours)"
	@echo "make best    train the best generator found, and write 10,000 of its images"
	@echo "make bench   measure how fast training, searching and sampling are (long)"
	@echo "make clean   remove caches and build files; your runs and the environment stay"
	@echo
	@echo "VENV=$(VENV)   the virtual environment to use or make"
	@echo "WORKERS=$(WORKERS)   processes that run the tests"
	@echo "TORCH=$(TORCH)   the build of PyTorch, if there is none yet: auto, cpu, cu130 ..."
	@echo "EXTRAS=$(EXTRAS)   what of the package is installed: dev, or some of search,export"
	@echo "PYTHON=$(PYTHON)   the Python (3.11 or newer) that makes it"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@python=$(BIN)/python; test -x $$python || python=$(PYTHON); \
		$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(BIN)/python || { echo "making the virtual environment $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@if $(BIN)/python -c 'import sys, torch; v = torch.__version__.split("."); sys.exit((int(v[0]), int(v[1])) < (2, 10))' 2>/dev/null; \
	then echo "keeping the PyTorch of this environment"; grep -v '^torch==' constraints.txt > $(READY).constraints; \
	else cp constraints.txt $(READY).constraints; \
		$(PIP) uv; \
		UV_HTTP_TIMEOUT=$${UV_HTTP_TIMEOUT:-10} UV_HTTP_RETRIES=$${UV_HTTP_RETRIES:-1} $(BIN)/uv pip install --quiet --python $(BIN)/python \
			--torch-backend "$(TORCH)" -c constraints.txt torch 2>$(READY).torch || \
		{ ! grep -s "invalid value" $(READY).torch || exit 2; cat $(READY).torch; \
		echo "uv could not install the build TORCH=$(TORCH) (see above): taking the one that pip finds"; }; fi
	@echo "installing the tested set of packages"
	$(PIP) -e '.[$(EXTRAS)]'
	@touch $@

data: $(READY)  ## Fetch and check Fashion-MNIST
	$(BIN)/vae-hyperband data --install

run: $(READY)  ## The whole job
	$(BIN)/vae-hyperband run

demo: $(READY)  ## The whole job on synthetic garments, without any download
	$(BIN)/vae-hyperband run --run demo --dataset drawn

test: $(READY)  ## The tests; Fashion-MNIST is fetched if it can be, one test uses it
	@$(BIN)/vae-hyperband data --install || echo "going on without Fashion-MNIST"
	$(PYTEST)

faults: $(READY)  ## The slow tests, most of which kill real processes
	$(PYTEST) -m faults

MINUTES ?= 60
soak: $(READY)  ## Random runs under random faults; prints what repeats a failure
	$(BIN)/python tests/soak.py --minutes $(MINUTES)

browser-test: $(READY)  ## The pages in a real Chromium
	$(PYTEST) -m browser

slurm-test: $(READY)  ## slurm_job.sh on a real Slurm of two nodes on this machine
	$(BIN)/python -m pytest -m slurm

lint: $(READY)  ## Format, style, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# MkDocs is for this target alone; make setup does not install it
$(READY)-docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(READY).constraints -e '.[docs]'
	@touch $@

docs: export NO_MKDOCS_2_WARNING = 1  # else each build says that Material for MkDocs ends in May 2027
docs: $(READY)-docs  ## The documentation as a site; a link that leads nowhere is an error
	$(BIN)/python -m mkdocs build  # --quiet would let broken links pass

wheel: $(READY)  ## The package for pip
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

reproduce: $(READY)  ## Train and evaluate every model of docs/results.json
	$(BIN)/python benchmarks/reproduce.py

best: $(READY)  ## The best generator found, and 10,000 of its images
	$(BIN)/vae-hyperband train --run best --preset images
	$(BIN)/vae-hyperband sample checkpoints/best/best.pt --sampler mixture --components 40 --num-samples 10000 --out best.npy
	$(BIN)/vae-hyperband sample checkpoints/best/best.pt --sampler mixture --components 40 --num-samples 100 --out best.png

# pythae is one of the peers; without its dependencies, which would bring another PyTorch
benchmarks/.pythae: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $@ \
		pythae==0.1.2 imageio==2.38.1 cloudpickle==3.1.2
	@touch $@

bench: $(READY) benchmarks/.pythae  ## How fast everything is; results in benchmarks/*.json
	$(BIN)/vae-hyperband data --install
	$(BIN)/python benchmarks/training_speed.py
	$(BIN)/python benchmarks/time_to_quality.py
	$(BIN)/python benchmarks/search_overhead.py
	$(BIN)/python benchmarks/generation_speed.py
	$(BIN)/python benchmarks/safety_cost.py

notebook: $(READY)  ## Execute model.ipynb in place
	$(BIN)/vae-hyperband data --install
	$(BIN)/jupyter execute --inplace vae_hyperband/model.ipynb

clean:  ## Remove what can be made again; checkpoints/, logs/ and the environment stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
