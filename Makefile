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
DIRTY    ?=
DRYRUN   ?=
SET      ?=
EXTRAS   ?= train,data

KNOWN = PYTHON CLOUD PRESET PARAMS RUN FROM DATA OUT TOKENS RANKS GPU NODES REGION SPOT BUDGET DEADLINE NOTIFY \
  BUCKET YES DIRTY DRYRUN SET EXTRAS SEED COUNT ONLY
SAID = $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name)))
ifneq ($(filter-out $(KNOWN),$(SAID)),)
$(error there is no variable $(filter-out $(KNOWN),$(SAID)): `make` lists them)
endif
ifneq ($(filter-out 0 1,$(SPOT)),)
$(error SPOT is $(SPOT), but must be 1 or 0)
endif

CASALLM = .venv/bin/python -m casallm
LAUNCH = .venv/bin/python -m launch
TESTED = train,data,cloud,dev

# `$(call pass,NAME,--option)` hands a value on as it was typed: BUDGET='$1500' is no variable of make's.
typed = $(subst ','\'',$(value $(1)))
pass = $(if $(value $(1)),$(2) '$(typed)')
setting = $(if $(value $(1)),'$(2)=$(typed)')

SIZE = $(call pass,PRESET,--preset) $(call pass,PARAMS,--params) $(call pass,DATA,--data) \
  $(call pass,TOKENS,--tokens)
RUN_OPTION = $(call pass,RUN,--run)
RANKS_OPTION = $(call pass,RANKS,--ranks)
LIMITS = $(call setting,BUDGET,budget.usd) $(call setting,DEADLINE,budget.deadline_hours)
DRY = $(if $(DRYRUN),--dry-run)
MACHINE = $(call pass,GPU,--gpu) $(call pass,NODES,--nodes) $(call pass,REGION,--region) \
  $(if $(filter 0,$(SPOT)),--on-demand) $(call pass,BUDGET,--budget) $(call pass,DEADLINE,--deadline)
RENT = $(call pass,CLOUD,--cloud) $(MACHINE) $(call pass,BUCKET,--bucket) \
  $(if $(DIRTY),--allow-dirty) $(if $(YES),--yes) $(DRY)
INSTALL = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup pretrain sft prepare estimate-cost report verify runs status logs down test test-all lint \
  bench chaos e2e clean

help: ## list the targets
	@echo "make TARGET [VARIABLE=value ...]"
	@grep -hE '^[a-z0-9 -]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9 -]+):[^#]*## (.*)/  \1|\2/' | column -t -s'|'
	@echo "variables: PRESET PARAMS RUN FROM DATA TOKENS RANKS BUDGET DEADLINE DRYRUN SET='section.key=value ...'"
	@echo "in a cloud: CLOUD GPU NODES REGION SPOT=0 BUCKET NOTIFY YES DIRTY (send uncommitted code)"

setup: .venv/.installed-$(EXTRAS) ## install into .venv what training needs (EXTRAS=train,data)

ifeq ($(CLOUD),local)
pretrain: .venv/.installed-train,data ## train a model: on this machine, or on CLOUD=aws
	$(strip $(CASALLM) pretrain $(SIZE) $(RUN_OPTION) $(RANKS_OPTION) $(LIMITS) $(DRY) $(SET))
else
pretrain: .venv/.installed-cloud
	$(strip $(LAUNCH) up pretrain $(SIZE) $(RUN_OPTION) $(RANKS_OPTION) $(RENT) $(SET))
endif

ifeq ($(CLOUD),local)
sft: .venv/.installed-train,data ## make an assistant of a pretrained run (FROM=, DATA=RECIPE)
	$(strip $(CASALLM) sft $(call pass,FROM,--from) $(call pass,DATA,--data) $(RUN_OPTION) $(RANKS_OPTION) \
	  $(LIMITS) $(DRY) $(SET))
else
sft: .venv/.installed-cloud
	$(strip $(LAUNCH) up sft $(call pass,FROM,--from) $(RUN_OPTION) $(RANKS_OPTION) $(RENT) $(SET))
endif

prepare: .venv/.installed-train,data ## turn documents (DATA=) into shards (OUT=)
	$(strip $(CASALLM) prepare $(call pass,DATA,--data) $(call pass,OUT,--out) $(SET))

estimate-cost: .venv/.installed-core ## hours and dollars, with a range, by offer (PARAMS=1.2B or BUDGET=100)
	$(strip $(CASALLM) estimate $(call pass,PARAMS,--params) $(call pass,PRESET,--preset) \
	  $(call pass,TOKENS,--tokens) $(if $(filter-out local,$(CLOUD)),$(call pass,CLOUD,--cloud)) \
	  $(MACHINE) $(if $(filter 1,$(SPOT)),--spot))

report: .venv/.installed-train,data ## write the report of a run again
	$(CASALLM) report $(call pass,RUN,)

verify: .venv/.installed-train,data ## check every checkpoint of a run
	$(CASALLM) verify $(call pass,RUN,)

runs: .venv/.installed-train,data ## list the runs
	$(CASALLM) runs

status logs down: .venv/.installed-cloud ## what runs in the cloud, what it says, and its end (RUN=)
	$(strip $(LAUNCH) $@ $(RUN_OPTION) $(call pass,BUCKET,--bucket) $(if $(filter down,$@), \
	  $(if $(filter-out local,$(CLOUD)),$(call pass,CLOUD,--cloud)) $(if $(YES),--yes)))

test: .venv/.installed-$(TESTED) ## the test suite, a few minutes on two cores
	.venv/bin/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder \
	  -m "not slow and not gpu and not network"

test-all: .venv/.installed-$(TESTED) ## the slow tests too
	.venv/bin/python -m pytest -q -m "not gpu and not network"

lint: .venv/.installed-$(TESTED) ## formatting, lint and types
	.venv/bin/ruff format --check . && .venv/bin/ruff check . && .venv/bin/mypy

bench: .venv/.installed-$(TESTED) ## the benchmarks that claims in the documentation rest on
	for script in benchmarks/*.py; do .venv/bin/python $$script; done

chaos: .venv/.installed-$(TESTED) ## the fault campaign (SEED= COUNT= ONLY= OUT=)
	.venv/bin/python -m tests.chaos $(if $(SEED),--seed $(SEED)) $(if $(COUNT),--count $(COUNT)) \
	  $(if $(ONLY),--only $(ONLY)) $(if $(OUT),--out $(OUT))

e2e: .venv/.installed-$(TESTED) ## whole runs in a simulated cloud of this machine (needs root)
	CASALLM_E2E=1 .venv/bin/python -m pytest -q tests/simcloud

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
