PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

# The build of Paddle: cpu, gpu (with CUDA=118, 126, ...), or any pip requirement with its options. The choice is kept in
# .venv/paddle, so that only another one reinstalls.
CUDA ?= 126
ifndef PADDLE
PADDLE := $(shell cat .venv/paddle 2>/dev/null || echo cpu)
endif
GPU := paddlepaddle-gpu~=3.3.0 --index-url https://www.paddlepaddle.org.cn/packages/stable/cu$(CUDA)/
REQUIREMENT := $(if $(filter $(PADDLE),cpu),paddlepaddle~=3.3.0,$(if $(filter $(PADDLE),gpu),$(GPU),$(PADDLE)))

TORCH := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# each process that the tests start would else compile the packages anew
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install train test test-long test-gpu clean FORCE

# training needs no Torch: the self-check then compares with recorded results
train: .venv/package
	$(BIN)/python tools/train.py -c configs/digits.yaml

# all of it: Torch for parity, and what the tests need
install: .venv/installed

# a process on each core with one thread in each: more threads than cores wait for each other
test: install
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-long: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long --numprocesses auto

# without a GPU each of these says that it is skipped
test-gpu: install
	$(BIN)/python -m pytest -m gpu -rs

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13) and "Python 3.10 to 3.13 is needed, this is " + sys.version.split()[0] + "; name another with: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

# both builds are the module paddle, so one has to go before the other comes; xargs reads quotes and no > or <
.venv/paddle: FORCE | $(BIN)/python
	@echo '$(REQUIREMENT)' | cmp -s - $@ || { set -e; \
	    if test -e $@; then $(PIP) uninstall --yes paddlepaddle paddlepaddle-gpu; rm $@; fi; \
	    echo 'installing $(REQUIREMENT)'; echo '$(REQUIREMENT)' | xargs $(PIP) install; \
	    echo '$(REQUIREMENT)' > $@; }

.venv/package: pyproject.toml setup.py .venv/paddle
	$(PIP) install --editable .
	touch $@

# on Linux the Torch of pip's own index brings several GB of CUDA, so Torch's index of CPU builds is asked first
.venv/installed: .venv/package
	$(PIP) install --retries 0 --index-url $(TORCH_INDEX) $(TORCH) || { \
	    echo '$(TORCH_INDEX) has no $(TORCH) for here; it comes from the index that pip is set to'; $(PIP) install $(TORCH); }
	$(PIP) install --editable '.[parity,dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
