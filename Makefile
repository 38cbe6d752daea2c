# Needs make and Python 3.11 or newer; everything else is installed into .venv (another place: make VENV=... test).

PYTHON ?= python3.11
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
EXAMPLES := t5-base switch-base-128 mixtral-8x7b qwen3-235b-a22b deepseek-v3
CACHES := .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench netlab constraints clean
.NOTPARALLEL:

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(INSTALLED)-train ## forecast five models; then measure small jobs here, calibrate, and forecast others
	$(BIN)/moecast forecast $(EXAMPLES:%=examples/%.yaml) --html demo.html
	$(BIN)/python -m benchmarks.loop --out runs/loop

test: $(INSTALLED)-test ## run the tests (more options: make test PYTEST_ARGS="-k name -x")
	$(BIN)/pytest -n auto $(PYTEST_ARGS)

lint: $(INSTALLED)-dev ## check style, format, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)-test ## run the benchmarks that need nothing beside this folder (benchmarks/bench_*.py)
	@set -e; for script in $(sort $(wildcard benchmarks/bench_*.py)); do \
		echo "==> $$script"; $(BIN)/python $$script; \
	done

netlab: $(INSTALLED)-train ## measure, calibrate and validate on hosts in network namespaces (needs root and iproute2)
	$(BIN)/python -m benchmarks.netlab

constraints: ## resolve all dependencies anew and write their versions to constraints.txt
	$(check-python)
	@echo "==> resolving the newest versions of all dependencies"
	@set -e; scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	$(PYTHON) -m venv "$$scratch/venv"; \
	"$$scratch/venv/bin/python" -m pip --disable-pip-version-check -q install --dry-run --ignore-installed \
		--report "$$scratch/report.json" '.[train,tpu,test,dev]'; \
	"$$scratch/venv/bin/python" -c "$$list_versions" "$$scratch/report.json" > "$$scratch/constraints.txt"; \
	cp "$$scratch/constraints.txt" constraints.txt
	@echo "==> constraints.txt: $$(grep -c == constraints.txt) packages"

clean: ## remove .venv, caches, builds, demo.html and runs/loop
	rm -rf .venv build dist *.egg-info demo.html runs/loop $(CACHES)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment, in sizes: the command alone, with the trainer, with the test tools, with the lint tools.
$(INSTALLED)-train: extras := [train]
$(INSTALLED)-test: extras := [train,test]
$(INSTALLED)-dev: extras := [train,dev]
$(INSTALLED) $(INSTALLED)-train $(INSTALLED)-test $(INSTALLED)-dev: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "==> installing moecast$(extras) into $(VENV)"
	@$(PIP) -q install -c constraints.txt -e '.$(extras)'
	@touch $@

$(BIN)/pip:
	$(check-python)
	@echo "==> creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

define check-python
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	echo "moecast needs Python 3.11 or newer, and '$(PYTHON)' is missing or older; name another with make PYTHON=..." >&2; \
	exit 1; }
endef

define list_versions
import json, re, sys
print("# The versions that are tested, on Python 3.11. Do not edit: `make constraints` writes this file.")
found = [entry["metadata"] for entry in json.load(open(sys.argv[1]))["install"]]
pins = {re.sub("[-_.]+", "-", m["name"]).lower(): m["version"] for m in found}
del pins["moecast"]
for name in sorted(pins):
    print(f"{name}=={pins[name]}")
endef
export list_versions
