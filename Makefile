# Thin calls of `hw3` (`make help`). Every target creates $(VENV) and installs the pinned packages first, once.
# VENV=            uses the environment that is active, as it is.

MODEL      ?= tiny
RECIPE     ?= qlora
RUN        ?= outputs/$(MODEL)-$(RECIPE)
GPUS       ?= 1
ACCELERATE ?= ddp
SHOTS      ?= 0
CHECKPOINT ?= best
VENV       ?= .venv
PYTHON     ?= python3

recipe := recipes/$(MODEL)/$(RECIPE).yaml
bin    := $(if $(VENV),$(VENV)/bin/)
ready  := $(if $(VENV),$(VENV)/.installed)
set    := $(if $(TRAIN),data.train=$(TRAIN)) $(if $(EVAL),data.eval=$(EVAL)) $(SET)
shared := $(if $(filter-out 1,$(GPUS)),--processes $(GPUS) --accelerate accelerate_configs/$(ACCELERATE).yaml)
launch := $(if $(filter-out 1,$(GPUS)),$(bin)accelerate launch --config_file accelerate_configs/$(ACCELERATE).yaml --num_processes $(GPUS) --main_process_port 0 -m hw3,$(bin)hw3)

ifeq ($(wildcard $(recipe)),)
$(error $(recipe): no such file; there are $(filter-out recipes/prompts/%,$(wildcard recipes/*/*.yaml)))
endif
ifneq ($(filter fsdp2 zero3,$(ACCELERATE)),)
ifeq ($(GPUS),1)
$(error ACCELERATE=$(ACCELERATE) spreads a model over several GPUs; say how many: GPUS=2)
endif
endif
ifeq ($(wildcard accelerate_configs/$(ACCELERATE).yaml),)
$(error ACCELERATE=$(ACCELERATE): no such file; there are $(basename $(notdir $(wildcard accelerate_configs/*.yaml))))
endif

.PHONY: help train eval shots predict compare report pack export check data base bench lint format test test-slow
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

train: $(ready)  ## fine-tune, or resume: MODEL= RECIPE= RUN= TRAIN= EVAL= GPUS= ACCELERATE= SET="key=value ..."
ifneq ($(GPUS),1)
	@$(bin)hw3 check $(recipe) --run $(RUN) $(shared) --no-probe $(set) > /dev/null
endif
	$(launch) train $(recipe) --run $(RUN) $(set)

eval: $(ready)  ## score the base and every checkpoint: RUN= EVAL= SHOTS="0 4" PROMPTS="study bare" GPUS=
	$(launch) eval $(RUN) $(if $(EVAL),--data $(EVAL)) --shots $(SHOTS) \
		$(if $(PROMPTS),--prompt $(PROMPTS:%=recipes/prompts/%.yaml))

shots: $(ready)  ## score the un-tuned base with 0, 1, 2 and 4 worked examples
	$(launch) eval $(RUN) --recipe $(recipe) $(if $(EVAL),--data $(EVAL)) --base-only --shots 0 1 2 4

predict: $(ready)  ## translate rows: INPUT= OUTPUT= CHECKPOINT=best|last|base|NAME RUN= GPUS= SET="generation.num_beams=4"
	$(launch) predict $(RUN) $(INPUT) $(SET) --checkpoint $(CHECKPOINT) $(if $(OUTPUT),--output $(OUTPUT)) \
		$(if $(INPUT),,< /dev/null)

compare: $(ready)  ## answers side by side: RUNS="outputs/a outputs/b/base" ID= DATA=
	$(bin)hw3 compare $(or $(RUNS),$(RUN)) $(if $(ID),--id $(ID)) $(if $(DATA),--data $(DATA))

pack: $(ready)  ## the homework's submission folder, checked as its grader would: RUN= INPUT= OUT= CHECKPOINT= FOR=2024 URL=
	$(bin)hw3 pack $(RUN) --checkpoint $(CHECKPOINT) $(if $(INPUT),--input $(INPUT)) $(if $(OUT),--out $(OUT)) \
		$(if $(FOR),--for $(FOR)) $(if $(URL),--url $(URL))

export: $(ready)  ## the adapter merged into its base, a model of its own: RUN= OUT= CHECKPOINT=
	$(bin)hw3 export $(RUN) --checkpoint $(CHECKPOINT) $(if $(OUT),--out $(OUT))

report: $(ready)  ## one HTML page and one Markdown file: RUNS="outputs/a outputs/b", the main run first
	$(bin)hw3 report $(or $(RUNS),$(RUN))

check: $(ready)  ## what a run would do: recipe, lengths, tokens and mask, memory, disk, time: GPUS= ACCELERATE=
	$(bin)hw3 check $(recipe) --run $(RUN) --mask 2 $(shared) $(set)

data: $(ready)  ## rows like the homework's into OUT=data/homework: CORPUS= (clone, archive, address, parts) SHA256= EXCLUDE="a.json b.json"
	$(bin)hw3 data build $(if $(CORPUS),--corpus $(CORPUS)) $(if $(SHA256),--sha256 $(SHA256)) \
		$(if $(EXCLUDE),--exclude $(EXCLUDE)) $(if $(OUT),--out $(OUT))

base: $(ready)  ## rebuild the embedded base on one GPU: CORPUS=DIR, the parts of the public corpus
	$(bin)python tools/build_base.py build --corpus $(CORPUS) --out data/tiny

bench: $(ready)  ## benchmarks on one GPU: TOKENIZER=DIR, Gemma's vocabulary; EVAL=FILE, rows to score
	$(bin)python benchmarks/gpu_recipe.py --tokenizer $(TOKENIZER)
	$(bin)python benchmarks/evaluation.py --tokenizer $(TOKENIZER) --data $(if $(EVAL),$(EVAL),data/eval.json)

lint: $(ready)  ## style
	$(bin)ruff check .
	$(bin)ruff format --check .

format: $(ready)  ## mend style
	$(bin)ruff check --fix .
	$(bin)ruff format .

test: lint  ## style and tests, the tiny model end to end; no network
	$(bin)python -m pytest -m "not slow and not gpu"

test-slow: lint  ## every test, those for a GPU as well
	$(bin)python -m pytest

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,tools]'
	@touch $@
