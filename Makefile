PYTHON ?= python3
BIN := .venv/bin

.PHONY: install train test clean

install: .venv/installed

# torch belongs to the parity extra: without it the self-check compares with recorded results instead
.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12) and "Python 3.10 to 3.12 is needed, this is " + sys.version.split()[0] + "; name another with: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[parity,dev]'
	touch $@

train: install
	$(BIN)/python tools/train.py -c configs/digits.yaml

test: install
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

clean:
	rm -rf .venv build *.egg-info
