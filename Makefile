# make train   set everything up, then train, adapt and report on the sample data
# make test    set everything up, then lint and test
# make test-slow   what takes longer: ten kills, two thousand iterations, a thousand examples of each property
#
# Everything goes into .venv; PYTHON=python3.11 chooses the interpreter that it is made with.

PYTHON ?= $(firstword $(foreach p,python3 python3.12 python3.11 python3.10 python3.9,$(shell $(p) -c \
	'import sys; print("$(p)" if (3, 9) <= sys.version_info < (3, 13) else "")' 2>/dev/null)))
BIN := .venv/bin
# Newer versions of pip take the constraints of build environments from PIP_BUILD_CONSTRAINT: basicsr needs torch to
# be built, and without a constraint that would be another release of it.
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/pip
OPT ?= options/drtl_x4.yml

.PHONY: train test test-slow lint clean

train: .venv/installed
	$(BIN)/basicsr train -opt $(OPT)

test: .venv/installed-dev lint
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal --cov --cov-report=term

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -m "slow or fuzz" --hypothesis-profile=slow

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/pip:
	@test -n "$(PYTHON)" || { echo 'drtl_plugin needs Python 3.9, 3.10, 3.11 or 3.12 (basicsr cannot be built on' \
		'later ones); none was found. Install one, or name it: make PYTHON=/path/to/python3.11'; exit 2; }
	$(PYTHON) -m venv .venv

# The pip that Python 3.9 and 3.10 bring builds basicsr in an old way that fails.
.venv/installed: .venv/bin/pip setup.py constraints.txt
	$(PIP) install --quiet --upgrade pip
	$(PIP) install --quiet --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(PIP) install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv
