# The two commands of a newcomer:  make demo  and  make test.  Each sets up .venv by itself on first use.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# Idle threads that spin cost half of a small machine.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0

.PHONY: demo test check format bench bench-quick clean

demo: .venv/.ready
	$(BIN)/dagkit demo

test: .venv/.ready
	$(BIN)/pytest

check: .venv/.ready
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.ready
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

.venv/.ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "dagkit needs Python 3.11 or newer. Install it, or set PYTHON=/path/to/it."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

bench: .venv/.ready
	$(BIN)/python tests/benchmarks/bench.py

bench-quick: .venv/.ready
	$(BIN)/python tests/benchmarks/bench.py --quick

clean:
	rm -rf .venv build dist runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
