# Every target makes its own environment first: `make test` is all a fresh clone needs besides Python 3.12.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PLAN_VENV := .venv-plan

.PHONY: test test-slow test-chaos test-sandbox test-plan demo lint format constraints clean

test: $(INSTALLED)  ## all but the tests marked slow, two workers
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not chaos"

test-slow: $(INSTALLED)  ## those: several processes, kills, whole recipes
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow

test-chaos: $(INSTALLED)  ## kills in every phase, lost processes, other devices, damage, full disks; about eight minutes
	$(BIN)/python -m pytest -n 2 --dist worksteal -rP -m chaos tests/test_chaos.py

test-sandbox: $(INSTALLED)  ## hostile programs, the sandbox then being required (apt-get install bubblewrap)
	WMSS_REQUIRE_SANDBOX=1 $(BIN)/python -m pytest tests/test_sandbox.py

test-plan: $(PLAN_VENV)/.installed  ## steps compiled for TPUs and GPUs that are not there; minutes each for the largest
	JAX_PLATFORMS=cpu $(PLAN_VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
	  -m "slow or not slow" tests/test_plan_8b.py tests/test_plan_*.py tests/test_topologies.py

demo: $(INSTALLED)  ## the whole method on a tiny model, in about five minutes
	$(BIN)/wmss demo

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): EXTRAS := dev
$(PLAN_VENV)/.installed: EXTRAS := dev,plan-tpu,plan-cuda
%/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	  { echo "Python >= 3.12 is needed, $(PYTHON) is $$($(PYTHON) -c 'import platform; print(platform.python_version())'): make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --upgrade uv
	$*/bin/uv pip install --quiet --python $*/bin/python -e ".[$(EXTRAS)]" -c constraints.txt
	@touch $@

constraints:  ## exact versions of everything any extra installs, names and versions only
	$(BIN)/uv pip compile pyproject.toml --all-extras --python-version 3.12 --no-header --no-annotate --upgrade -o constraints.txt

clean:
	rm -rf $(VENV) $(PLAN_VENV) dist build .pytest_cache .ruff_cache
