# casallm: every target is one command. `make` lists them; variables are optional.

PYTHON   ?= python3
CLOUD    ?= local
PRESET   ?=
PARAMS   ?=
RUN      ?=
FROM     ?=
DATA     ?=
OUT      ?=
TOKENS   ?=
RANKS    ?=
GPU      ?=
NODES    ?=
REGION   ?=
SPOT     ?=
BUDGET   ?=
DEADLINE ?=
NOTIFY   ?=
BUCKET   ?=
YES      ?=
DRYRUN   ?=
SET      ?=
EXTRAS   ?= train,data

CASALLM = .venv/bin/python -m casallm
INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup pretrain prepare estimate-cost report verify runs sample test test-all lint bench chaos clean

help: ## list the targets
	@echo "make TARGET [VARIABLE=value ...]"
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  \1|\2/' | column -t -s'|'
	@echo "variables: PRESET PARAMS RUN DATA TOKENS RANKS BUDGET DEADLINE DRYRUN SET='section.key=value ...'"

setup: .venv/.installed-$(EXTRAS) ## install into .venv what training needs (EXTRAS=train,data)

pretrain: .venv/.installed-train,data ## train a model: the built-in corpus on this machine unless said otherwise
	$(CASALLM) pretrain $(if $(RUN),--run $(RUN)) $(if $(PRESET),--preset $(PRESET)) $(if $(PARAMS),--params $(PARAMS)) \
	  $(if $(DATA),--data $(DATA)) $(if $(TOKENS),--tokens $(TOKENS)) $(if $(RANKS),--ranks $(RANKS)) \
	  $(if $(BUDGET),budget.usd=$(BUDGET)) $(if $(DEADLINE),budget.deadline_hours=$(DEADLINE)) $(if $(DRYRUN),--dry-run) $(SET)

prepare: .venv/.installed-train,data ## turn documents (DATA=) into shards (OUT=)
	$(CASALLM) prepare $(if $(DATA),--data $(DATA)) $(if $(OUT),--out $(OUT)) $(SET)

estimate-cost: .venv/.installed-core ## hours and dollars, with a range, by offer (PARAMS=1.2B or BUDGET=100)
	$(CASALLM) estimate $(if $(PARAMS),--params $(PARAMS)) $(if $(PRESET),--preset $(PRESET)) $(if $(TOKENS),--tokens $(TOKENS)) \
	  $(if $(GPU),--gpu $(GPU)) $(if $(NODES),--nodes $(NODES)) $(if $(REGION),--region $(REGION)) \
	  $(if $(BUDGET),--budget $(BUDGET)) $(if $(DEADLINE),--deadline $(DEADLINE))

report: .venv/.installed-train,data ## write the report of a run again
	$(CASALLM) report $(RUN)

verify: .venv/.installed-train,data ## check every checkpoint of a run
	$(CASALLM) verify $(RUN)

runs: .venv/.installed-train,data ## list the runs
	$(CASALLM) runs

test: .venv/.installed-train,data,dev ## the test suite, a few minutes on two cores
	.venv/bin/python -m pytest -q -n 2 -m "not slow and not gpu and not network"

test-all: .venv/.installed-train,data,dev ## the slow tests too
	.venv/bin/python -m pytest -q -m "not gpu and not network"

lint: .venv/.installed-train,data,dev ## formatting, lint and types
	.venv/bin/ruff format --check . && .venv/bin/ruff check . && .venv/bin/mypy

bench: .venv/.installed-train,data,dev ## the benchmarks that claims in the documentation rest on
	for script in benchmarks/*.py; do .venv/bin/python $$script; done

chaos: .venv/.installed-train,data,dev ## the fault campaign (SEED= COUNT= ONLY= OUT=)
	.venv/bin/python -m tests.chaos

clean: ## remove .venv and caches; runs/ and data/ stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache *.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11: install Python 3.11 or newer, or say make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed-core: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e .
	@touch $@

.venv/.installed-%: pyproject.toml constraints.txt | .venv/bin/python
	$(INSTALL) -e '.[$*]'
	@touch $@
