# Five stages that exchange files: prepare -> sync -> train -> convert -> evaluate, and a report over them.
# The target of a stage is runs/<run>/<stage>/manifest.json; lib/sft/runner/plan.py decides by content which are stale.
# UPPER case variables are Make's own; lower case ones override a field of the recipe: make train RECIPE=x lr=1e-4

CLUSTER ?= local
PYTHON  ?= python3
override RUNS := $(patsubst %/,%,$(or $(RUNS),runs))
GOALS   := $(or $(MAKECMDGOALS),help)
STAGES  := prepare sync train convert evaluate report
ifneq ($(filter smoke,$(GOALS)),)
  override RECIPE += smoke
endif

unexport DETACH # only the last requested stage is detached; Make waits for those before it
# Run this checkout's code, also if .venv is a link or was made in another clone.
export PYTHONPATH := $(CURDIR)/lib$(if $(PYTHONPATH),:$(PYTHONPATH))
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: FORCE smoke all $(STAGES) record-versions preview steps export clean-cache to-hf to-core soup push-hub card chat serve help setup check compiled test test-quick lr-range overfit new show why sweep runs extend delete archive schema completion fields verify diff lock nightly cp fetch dry-run jobs cancel collect doctor

# Values reach the shell in single quotes, whatever they contain.
quote = '$(subst ','\'',$(1))'
SFT   = PYTHONPATH=lib $(PYTHON) -S -m sft $(1) --runs $(call quote,$(RUNS)) --data $(call quote,$(DATA)) \
        --cluster $(call quote,$(CLUSTER)) --recipe $(call quote,$(RECIPE)) --overrides $(call quote,$(MAKEOVERRIDES))
PLAN := $(shell $(call SFT,plan) --goals $(call quote,$(GOALS)))
$(if $(filter plan-ok,$(PLAN)),,$(error nothing was run))
planned = $(patsubst $(1):%,$(2)%,$(filter $(1):%,$(PLAN)))

DIRS  := $(call planned,run,$(RUNS)/)
OTHER := $(call planned,model,$(RUNS)/)
OWN   := $(filter-out $(OTHER),$(DIRS))
ARGS   = $(if $(filter-out local,$(CLUSTER)),--cluster $(call quote,$(CLUSTER))) $(if $(DATA),--data $(call quote,$(DATA))) $(call planned,set)
READY := .venv/ready-$(call planned,environment)
TOOLS := .venv/tools-$(call planned,environment)
PY    := .venv/bin/python

# env/<launcher>.sh starts a stage here or as a job, as the cluster's file says, and waits for it. A stage that another run has is
# only referred to.
reused = $(patsubst reuse:$(notdir $*)/$(1):%,%,$(filter reuse:$(notdir $*)/$(1):%,$(PLAN)))
launch = $(if $(call reused,$(1)),@$(call SFT,reuse) --run $(notdir $*) --stage $(1) --origin $(call reused,$(1)),$(call start,$(1),$(2)))
tool   = $(if $(call planned,tool),$(call detach,$(1))$(PY) -m sft.launch.tools $(call quote,$(CLUSTER)) $(call quote,$(RUNS)) $(1),$(PY) stages/$(subst -,_,$(1)).py)
detach = $(if $(filter $(1),$(call planned,detach)),DETACH=1 )
start  = @$(call detach,$(1))env/$(call planned,launcher-$(1)).sh $* $(1) $(2) $* $(ARGS)

$(DIRS:%=%/prepare/manifest.json):  %/prepare/manifest.json:  | $(READY) ; $(call launch,prepare,$(PY) stages/prepare.py)
$(OWN:%=%/sync/manifest.json):      %/sync/manifest.json:     | %/prepare/manifest.json ; $(call launch,sync,$(PY) stages/sync.py)
$(OWN:%=%/train/manifest.json):     %/train/manifest.json:    | %/sync/manifest.json ; $(call launch,train,stages/train.sh)
$(OWN:%=%/convert/manifest.json):   %/convert/manifest.json:  | %/train/manifest.json ; $(call launch,convert,$(PY) stages/convert.py)
$(OWN:%=%/evaluate/manifest.json):  %/evaluate/manifest.json: | %/convert/manifest.json ; $(call launch,evaluate,$(PY) stages/evaluate.py)
# A run of another model (MODEL=) trains nothing: each of the two reads that model itself.
$(OTHER:%=%/convert/manifest.json):  %/convert/manifest.json:  | %/prepare/manifest.json ; $(call launch,convert,$(PY) stages/convert.py)
$(OTHER:%=%/evaluate/manifest.json): %/evaluate/manifest.json: | %/prepare/manifest.json ; $(call launch,evaluate,$(PY) stages/evaluate.py)
# `make report` shows the finished stages. With other goals it runs after them.
BEFORE := $(if $(filter all smoke,$(GOALS)),evaluate,$(filter $(filter-out report,$(STAGES)),$(GOALS)))
$(DIRS:%=%/report/manifest.json):   %/report/manifest.json:   | $(READY) $(foreach s,$(BEFORE),%/$(s)/manifest.json) ; @$(PY) stages/report.py $* $(ARGS)
$(patsubst %,$(RUNS)/%/manifest.json,$(call planned,stale)): FORCE

## The pipeline, for RECIPE=name (several: RECIPE="a b"), on CLUSTER=local, with data under DATA=folder[:folder]
prepare:  $(DIRS:%=%/prepare/manifest.json)  ## chat data -> token ids, loss mask, document boundaries, mask proof
sync:     $(if $(CHECK),| $(READY),$(DIRS:%=%/sync/manifest.json)) ## dataset and base weights -> the cluster's storage, verified [CHECK=1 only compares]
	$(if $(CHECK),@$(foreach d,$(DIRS),$(PY) stages/sync.py $d --check $(ARGS) &&) true)
train:    $(DIRS:%=%/train/manifest.json)    ## packed, distributed, resumable training -> checkpoints
convert:  $(DIRS:%=%/convert/manifest.json)  ## checkpoint -> Hugging Face folder, proven equal [MODEL=step of another run or trainer]
evaluate: $(DIRS:%=%/evaluate/manifest.json) ## lm-eval tasks -> scores with standard errors [MODEL=runs/x/train/step300, folder, gs:// or hf://org/name]
report:   $(DIRS:%=%/report/manifest.json)   ## one HTML page about the finished stages
all smoke: $(DIRS:%=%/evaluate/manifest.json) $(DIRS:%=%/report/manifest.json) ## every stage and the report; make smoke = make all RECIPE=smoke
export: $(DIRS:%=%/prepare/manifest.json) ## the dataset as a folder for OLMo-core's own scripts: make export RECIPE=x DST=folder
	@$(foreach d,$(DIRS),$(PY) stages/export.py $d $(call quote,$(DST)) &&) true
steps: $(DIRS:%=%/prepare/manifest.json) ## the arithmetic of training, before it: packs, steps, padding, trained tokens of a step, GPU memory
	@$(foreach d,$(DIRS),$(PY) -m sft.packing.arithmetic $d $(ARGS) &&) true
lr-range: $(DIRS:%=%/sync/manifest.json) ## raise the learning rate from step to step, on this machine, and suggest a range: [LOW=1e-7] [HIGH=1] [STEPS=100]; a page in runs/<run>/lr-range/
	@$(foreach d,$(DIRS),env/local.sh $d train $(PY) stages/lr_range.py $(if $(LOW),--low $(call quote,$(LOW))) $(if $(HIGH),--high $(call quote,$(HIGH))) $(if $(STEPS),--steps $(call quote,$(STEPS))) $d $(ARGS) &&) true
overfit: $(DIRS:%=%/sync/manifest.json) ## train one batch to a loss near 0, on this machine: do mask, loss and optimizer work? [BOUND=0.1] [STEPS=200]
	@$(foreach d,$(DIRS),env/local.sh $d train $(PY) stages/overfit.py $(if $(BOUND),--bound $(call quote,$(BOUND))) $(if $(STEPS),--steps $(call quote,$(STEPS))) $d $(ARGS) &&) true
.PHONY: watch compare baseline
watch: | $(READY) ## evaluate checkpoints while training runs ([evaluate] every > 0; make train starts it by itself)
	@$(foreach d,$(DIRS),$(PY) stages/watch.py $d $(ARGS) &&) true
baseline: $(DIRS:%=%/evaluate/manifest.json) ## score the base under the tasks, template and sampling of RECIPE=; report and compare show it beside the run
preview: | $(READY) ## print conversations as they are tokenized, trained tokens colored: [SOURCE=n] [ROW=n]
	@$(foreach d,$(DIRS),$(PY) stages/preview.py $d $(ARGS) $(if $(SOURCE),--source $(call quote,$(SOURCE))) $(if $(ROW),--row $(call quote,$(ROW))) &&) true

## Jobs, on a CLUSTER with a scheduler. DETACH=1 does not wait for the last stage's job; the same make follows it again
dry-run: export DRY_RUN := 1
dry-run: $(DIRS:%=%/$(or $(STAGE),$(if $(OTHER),evaluate,train))/manifest.json) ## print what would be submitted, up to STAGE=train
jobs: | $(READY) ## list the jobs of all runs, with their attempts and states
	@$(PY) -m sft.launch.commands jobs $(call quote,$(RUNS))
cancel: | $(READY) ## cancel the jobs of RECIPE=
	@$(PY) -m sft.launch.commands cancel $(DIRS)
collect: | $(READY) ## fetch the results of detached jobs of RECIPE= from other disks
	@$(PY) -m sft.launch.commands collect $(DIRS)
doctor: ## check all that RECIPE= needs on CLUSTER=, in one table: data, batch, memory, hours, disk, secrets
	@$(call SFT,doctor)

## Recipes and runs (these need no environment)
new:    ; @$(call SFT,new) --from $(call quote,$(FROM)) ## copy a recipe: make new FROM=olmo3-7b RECIPE=my-exp lr=1e-4
show:   ; @$(call SFT,show) ## the resolved recipe, its model and the state of its stages
why:    ; @$(call SFT,why) ## the reasons why each stage would run
fields: ; @$(call SFT,fields) ## every option of a recipe with its default
verify: ; @$(call SFT,verify) --run $(call quote,$(RUN)) ## hash every output of RUN= and check its chain of manifests
diff:   ; @$(call SFT,diff) --a $(call quote,$(A)) --b $(call quote,$(B)) ## the first stage in which runs A= and B= differ, and its fields that differ

sweep: | $(READY) ## sibling runs of all combinations, compared: make sweep RECIPE=x lr="1e-5 3e-5" seed="1 2" [GOAL=train|evaluate|all] [JOBS=n at a time]
	@$(call SFT,sweep)
.PHONY: import-config
import-config: | $(READY) ## a recipe from another trainer's configuration, and what is not carried over: make import-config FROM=axolotl.yml [RECIPE=name] [GPUS=8] [TRAINER=trl]
	@$(PY) stages/import_config.py $(call quote,$(FROM)) --recipe $(call quote,$(RECIPE)) --trainer $(call quote,$(TRAINER)) $(if $(GPUS),--gpus $(call quote,$(GPUS))) --cluster $(call quote,$(CLUSTER))
runs:   ; @$(call SFT,runs) ## all runs in a table: stage, step, loss, tokens/s, time left, job, age, size
extend: ; @$(call SFT,extend) $(if $(YES),--yes) ## let the finished training of RECIPE= go on after its epochs or steps were raised [YES=1; without it, say how]
delete: ; @$(call SFT,delete) --run $(call quote,$(RUN)) $(if $(YES),--yes) ## delete RUN=; stages that other runs refer to stay [YES=1; without it, say what goes]
archive: ; @$(call SFT,archive) --run $(call quote,$(RUN)) --dst $(call quote,$(DST)) $(if $(YES),--yes) ## pack RUN= into DST=file.tar, then delete it [YES=1]
schema: ; @$(call SFT,schema) ## JSON Schemas of recipes and cluster files, which editors read: recipes/recipe.schema.json, env/cluster.schema.json
completion: ; @$(call SFT,completion) ## completion of goals, recipes and fields: source <(make -s completion)

compare: ; @$(call SFT,compare) --a $(call quote,$(A)) --b $(call quote,$(B)) --c $(call quote,$(C)) $(if $(ANYWAY),--anyway) ## compare the scores of runs A= and B= [C="more runs"] item by item, with errors, and list options that differ

clean-cache: ; @$(call SFT,clean_cache) ## delete the caches of prepare: encoded chunks, screens, unpacked copies; datasets stay
cp: | $(READY) ## copy files: make cp SRC=gs://b/x DST=folder [NO_CLOBBER=1] [DELETE=1] [CHECK=1 only compares]
	@$(PY) stages/cp.py $(call quote,$(SRC)) $(call quote,$(DST)) $(if $(CHECK),--check) $(if $(NO_CLOBBER),--no-clobber) $(if $(DELETE),--delete)
fetch: | $(READY) ## copy stages of a run from CLUSTER=c, verified: [STAGE=train] [FROM=gs://b/runs] [CHECK=1 only compares] [PUSH=1 sends them there]
	@$(foreach d,$(DIRS),$(PY) -m sft.sync.fetch $d $(ARGS) --stage $(call quote,$(STAGE)) --from $(call quote,$(FROM)) $(if $(PUSH),--push) $(if $(CHECK),--check) &&) true
to-hf: | $(READY) ## convert any OLMo-core step to a Hugging Face folder, proven equal: make to-hf SRC=stepN DST=folder [TOKENIZER=folder TEMPLATE=olmo dtype=…; with CLUSTER= one job]
	@$(call tool,to-hf) $(call quote,$(SRC)) $(call quote,$(DST)) $(if $(TOKENIZER),--tokenizer $(call quote,$(TOKENIZER))) $(if $(TEMPLATE),--template $(call quote,$(TEMPLATE))) $(call planned,set)
to-core: | $(READY) ## convert a Hugging Face folder, gs:// or hf://org/name to an OLMo-core step for [model] base: make to-core SRC=… DST=step0 [ADAPTER=folder, LoRA to merge; with CLUSTER= one job]
	@$(call tool,to-core) $(call quote,$(SRC)) $(call quote,$(DST)) $(if $(ADAPTER),--adapter $(call quote,$(ADAPTER))) $(call planned,set)
soup: | $(READY) ## average checkpoints into a step: make soup RUN=x STEPS="100 200 other-run/300" DST=folder [WEIGHTS="1 1 2"]
	@$(PY) stages/soup.py $(call quote,$(DST)) $(foreach s,$(STEPS),$(call quote,$s)) --run $(call quote,$(RUN)) --runs $(call quote,$(RUNS)) --weights $(call quote,$(WEIGHTS))
chat serve: | $(READY) ## talk to RUN= in the terminal [STEP=300] [MODEL=folder|hf://org/name] [TOKENS=1]; serve: print vLLM's command [ADAPTER=1 base and adapter apart] [START=1]
	@$(PY) stages/chat.py --run $(call quote,$(if $(RUN),$(RUNS)/$(RUN))) --step $(call quote,$(STEP)) --model $(call quote,$(MODEL)) $(if $(TOKENS),--tokens) $(if $(filter serve,$(GOALS)),--serve) $(if $(START),--start) $(if $(ADAPTER),--adapter) --data $(call quote,$(DATA))
push-hub: | $(READY) ## send the export to the Hugging Face hub: make push-hub RECIPE=x REPO=org/name [PUSH=1; without it, list the files] (HF_TOKEN; private)
	@$(foreach d,$(DIRS),$(PY) stages/push_hub.py $d --repo $(call quote,$(REPO)) --push $(call quote,$(PUSH)) $(ARGS) &&) true
card: | $(READY) ## print the model card with the scores so far
	@$(foreach d,$(DIRS),$(PY) stages/push_hub.py $d --card $(ARGS) &&) true

## The project
setup: | $(READY) $(TOOLS) ## make .venv with the pinned packages (torch for CUDA only if there is a GPU)
check: | $(TOOLS) ## lint, format, types, shell scripts, prose
	.venv/bin/ruff check . && .venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/shellcheck -x env/*.sh stages/*.sh .ci/run
	$(PY) tests/prose.py
compiled: | $(TOOLS) ## let Python compile the tests and numba what prepare runs, which takes a minute once (make test does it)
	@$(if $(TESTS),,.venv/bin/python -m pytest -o addopts= -qq -p no:cacheprovider -k "test_plain_rows_and_other_rows_give_the_same or test_forms and test_both_ways_make_the_same and thinker")
# Tests write bytecode, also in an image that forbids it. An environment that is made for them needs none ahead, which would take a minute and a half.
test test-quick: export PYTHONDONTWRITEBYTECODE :=
# All of this is compiled once, beside the checks, and not by every worker of pytest. Some TESTS may need none of it.
test: | $(TOOLS) ## all tests, and the branches of lib/sft that they take; TESTS="tests/test_packing.py -k name" for some of them
	@$(MAKE) --no-print-directory -j 2 check compiled
	.venv/bin/python -m pytest --cov --cov-report= $(TESTS)
	@echo "coverage of lib/sft: $$(.venv/bin/coverage report --format=total) %"
test-quick: | $(TOOLS) ## the tests that take less than half a second each, without servers and several ranks, in about two minutes on two cores
	.venv/bin/python -m pytest -m "not (slurm or server or compile or processes or seconds or slow)" $(TESTS)
.PHONY: mutants soak flip fuzz
mutants: | $(TOOLS) ## remove every protection once, in a copy, and look whether a test fails [ONLY=part of a name]
	@$(PY) tests/mutants.py $(call quote,$(ONLY))
soak: | $(TOOLS) ## N=200 kills and failures at random calls of each stage; every end has the bytes of an undisturbed run [STAGE="train convert"] [SEED=1, other faults]
	@$(PY) tests/soak.py $(call quote,$(or $(N),200)) $(call quote,$(STAGE)) --seed $(call quote,$(or $(SEED),0))
flip: | $(TOOLS) ## a bit, a cut and a deletion, N=3 of each, in every kind of file of a run: found and named, or harmless [ONLY=part of a name]
	@$(PY) tests/flip.py $(call quote,$(or $(N),3)) $(call quote,$(ONLY))
fuzz: | $(TOOLS) ## N=1000 inputs of every kind, made and damaged by hypothesis: used, or refused with an error of ours [ONLY=part of a name]
	@$(PY) tests/fuzz.py $(call quote,$(or $(N),1000)) $(call quote,$(ONLY))
record-versions: | $(TOOLS) ## tests/versions.json and formats.json, after a change of code that keeps bytes and files readable or raised a version number
	@$(PY) tests/versions.py
bench-%: | $(TOOLS) ## benchmarks: bench-pack bench-balance bench-loader bench-prepare bench-json bench-leader bench-convert bench-sync bench-save bench-gpu bench-gpu-all bench-peers bench-first-steps bench-templates bench-evaluate bench-lora bench-methods; each ends in one JSON line, which benchmarks/history/ keeps
	@$(PY) benchmarks/history.py run $*
.PHONY: bench-check
bench-check: | $(TOOLS) ## compare the newest numbers of the benches with benchmarks/baseline.json: a loss of more than the noise fails [ONLY="pack balance"]
	@$(PY) benchmarks/history.py check $(call quote,$(ONLY))
.PHONY: results
results: ; @$(PYTHON) benchmarks/history.py results ## write the benches' newest numbers of benchmarks/history/ into RESULTS.md
.PHONY: docs
docs: | $(TOOLS) ## the documentation as a site: site/index.html, with the reference made from the schema and this file
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict && echo site/index.html
nightly: ; env/nightly.sh ## what cron runs: make smoke in a clean clone, with runs of its own
slurm-%: | $(TOOLS) ## slurm-up, slurm-down: a real Slurm on this machine, to try CLUSTER=slurm with
	@$(PY) tests/slurm.py $*
lock: ; env/setup.sh lock ## resolve the newest allowed packages and pin them in env/lock.txt
help: ; @$(call SFT,help) ## this page

$(READY): ; @TORCH=$(or $(TORCH),$(call planned,torch)) PYTHON=$(or $(call planned,python),$(PYTHON)) env/setup.sh packages $@
$(TOOLS): | $(READY) ; @env/setup.sh tools $@
