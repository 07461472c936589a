# make train       set everything up, then train, adapt and report on the sample data
# make compare     what the method is worth: six arms on the sample data, beside committed results
# make test        set everything up, then lint, and run the quick tests
# make test-slow   all other tests: whole runs, the wheel in a clean environment, a thousand examples of each property
# make test-gpu    tests that need a GPU; all others run without one
# make test-wheel  of these, only the wheel
# make mutants     break the method in one place at a time; the tests must notice
#
# Everything goes into .venv. PYTHON=python3.11 chooses the interpreter, which must be 3.10 or later.

PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11 python3.10 python,$(shell $(p) -c \
	'import sys; print("$(p)" if sys.version_info >= (3, 10) else "")' 2>/dev/null)))
BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
# The versions that were tested, also for the isolated environments in which pip builds packages.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
OPT ?= options/drtl_x4.yml

.PHONY: train compare test test-slow test-gpu test-wheel mutants lint clean

train: .venv/installed
	$(BIN)/basicsr train -opt $(OPT)

compare: .venv/installed
	$(BIN)/python benchmarks/compare.py

test: .venv/installed-dev lint
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=worksteal --cov --cov-report=term

test-slow: .venv/installed-dev
	$(BIN)/python -m pytest -m "slow or fuzz or wheel" --hypothesis-profile=slow --numprocesses=auto --maxprocesses=4 \
		--dist=worksteal

test-gpu: .venv/installed-dev
	DRTL_TEST_GPU=1 $(BIN)/python -m pytest tests/test_gpu.py

test-wheel: .venv/installed-dev
	$(BIN)/python -m pytest -m wheel

mutants: .venv/installed-dev
	$(BIN)/python tests/mutants.py

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

.venv/created:
	@test -n "$(PYTHON)" || { echo 'drtl_plugin needs Python 3.10 or later, and none was found. Install one, or name' \
		'it: make PYTHON=/path/to/python3.12'; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@touch $@

.venv/installed: .venv/created setup.py constraints.txt drtl_plugin/install.py
	$(BIN)/python drtl_plugin/install.py
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

clean:
	rm -rf .venv
