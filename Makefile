PYTHON ?= python3
BIN := .venv/bin

.PHONY: install train test test-long clean

install: .venv/installed

# torch belongs to the parity extra: without it the self-check compares with recorded results instead
.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12) and "Python 3.10 to 3.12 is needed, this is " + sys.version.split()[0] + "; name another with: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[parity,dev]'
	touch $@

train: install
	$(BIN)/python tools/train.py -c configs/digits.yaml

# a process on each core with one thread in each: more threads than cores wait for each other
test: install
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-long: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long --numprocesses auto

clean:
	rm -rf .venv build *.egg-info
