# The two commands of a newcomer:  make demo  and  make test.  Each sets up .venv by itself on first use.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# Idle threads that spin cost half of a small machine.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0

OLDEST := .venv-oldest
OLD_TESTS := $(addprefix tests/unit/, commands concept models proposers registry segmenters test_attention.py test_cli.py \
	test_concept.py test_dataset.py test_dataset_strangers.py test_dataset_targets.py test_errors.py test_guard.py \
	test_guidance.py test_optimization.py test_plugins.py test_system.py test_token.py test_workspace.py) \
	$(addprefix tests/integration/, test_bind.py test_dataset_commands.py test_guard_pipelines.py test_guard_weapon.py test_sample.py \
	test_toy_family.py)
# SAM 2 came with transformers 4.56, signing and NudeNet are extras, pydantic words the same schema in other ways, the text
# encoders of transformers 4 do not run in float64, and what older releases draw as random weights fires at other steps
# than the last four of these tests look at.
NOT_OLD := not (sam2 or test_sign_then_publish_then_verify or test_shipped_concepts_lack_weights_at_most \
	or test_schema_is_the_published_one or equals_diffusers_own_pipeline or test_equals_the_plain_form_with_a_peers_mask \
	or test_equals_the_plain_form_at_any_strength or (test_reduced_precision and dtype1) \
	or test_each_guard_has_its_own_safety_condition_and_rows)

.PHONY: demo test test-demo test-oldest check format bench bench-quick clean

demo: .venv/.installed
	$(BIN)/dagkit demo

test: .venv/.ready
	$(BIN)/pytest

# The whole demo, on seeds on which nothing was chosen: some minutes each.
test-demo: .venv/.ready
	DAGKIT_DEMO_SEEDS="61 62 63" $(BIN)/pytest tests/integration/test_demo_gates.py

# With the lowest versions that pyproject.toml allows, on Python 3.11 or 3.12: docs/serving.md lists them.
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/pytest $(OLD_TESTS) --ignore tests/unit/registry/test_signing.py -k "$(NOT_OLD)"

check: .venv/.ready
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.ready
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# What the package needs, for the demo; the test tools come on top with the first command that takes them.
.venv/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "dagkit needs Python 3.11 or newer. Install it, or set PYTHON=/path/to/it."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/.ready: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

$(OLDEST)/.ready: pyproject.toml
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct --editable ".[test]"
	touch $@

bench: .venv/.ready
	$(BIN)/python tests/benchmarks/bench.py

bench-quick: .venv/.ready
	$(BIN)/python tests/benchmarks/bench.py --quick

clean:
	rm -rf .venv $(OLDEST) build dist runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
