# Each target calls `hw3`; `make help` lists them. The first call creates $(VENV) and installs the pinned packages.
# With an empty VENV=, targets use the active environment and install nothing.

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
$(error $(recipe): no such recipe; choose MODEL= and RECIPE= for one of $(filter-out recipes/prompts/%,$(wildcard recipes/*/*.yaml)))
endif
ifneq ($(filter fsdp2 zero3,$(ACCELERATE)),)
ifeq ($(GPUS),1)
$(error ACCELERATE=$(ACCELERATE) shards the model over several GPUs, but GPUS=1; set their number, such as GPUS=2)
endif
endif
ifeq ($(wildcard accelerate_configs/$(ACCELERATE).yaml),)
$(error ACCELERATE=$(ACCELERATE): no such file in accelerate_configs/; choose one of $(basename $(notdir $(wildcard accelerate_configs/*.yaml))))
endif

.PHONY: help train eval shots predict compare report pack export check data base bench lint format test test-slow
.DEFAULT_GOAL := help

help:  ## list all targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

train: $(ready)  ## fine-tune a model, or resume an interrupted run: MODEL= RECIPE= RUN= TRAIN= EVAL= GPUS= ACCELERATE= SET="key=value ..."
ifneq ($(GPUS),1)
	@$(bin)hw3 check $(recipe) --run $(RUN) $(shared) --no-time-estimate $(set) > /dev/null
endif
	$(launch) train $(recipe) --run $(RUN) $(set)

eval: $(ready)  ## score the base model and every checkpoint: RUN= EVAL= SHOTS="0 4" PROMPTS="study bare" GPUS=
	$(launch) eval $(RUN) $(if $(EVAL),--data $(EVAL)) --shots $(SHOTS) \
		$(if $(PROMPTS),--prompt $(PROMPTS:%=recipes/prompts/%.yaml))

shots: $(ready)  ## score the base model with 0, 1, 2 and 4 few-shot examples: RUN= EVAL=
	$(launch) eval $(RUN) --recipe $(recipe) $(if $(EVAL),--data $(EVAL)) --base-only --shots 0 1 2 4

predict: $(ready)  ## predict the outputs of rows: INPUT= OUTPUT= CHECKPOINT=best|last|base|NAME RUN= GPUS= SET="generation.num_beams=4"
	$(launch) predict $(RUN) $(INPUT) $(SET) --checkpoint $(CHECKPOINT) $(if $(OUTPUT),--output $(OUTPUT)) \
		$(if $(INPUT),,< /dev/null)

compare: $(ready)  ## print predictions side by side: RUNS="outputs/a outputs/b/base" ID= DATA=
	$(bin)hw3 compare $(or $(RUNS),$(RUN)) $(if $(ID),--id $(ID)) $(if $(DATA),--data $(DATA))

pack: $(ready)  ## build and verify the homework's submission folder: RUN= INPUT= OUTPUT= CHECKPOINT= GRADER_YEAR=2024 URL=
	$(bin)hw3 pack $(RUN) --checkpoint $(CHECKPOINT) $(if $(INPUT),--input $(INPUT)) $(if $(OUTPUT),--output $(OUTPUT)) \
		$(if $(GRADER_YEAR),--grader-year $(GRADER_YEAR)) $(if $(URL),--url $(URL))

export: $(ready)  ## merge the adapter into its base model: RUN= OUTPUT= CHECKPOINT=
	$(bin)hw3 export $(RUN) --checkpoint $(CHECKPOINT) $(if $(OUTPUT),--output $(OUTPUT))

report: $(ready)  ## write an HTML page and a Markdown file: RUNS="outputs/a outputs/b", the main run first
	$(bin)hw3 report $(or $(RUNS),$(RUN))

check: $(ready)  ## show what a run would do: recipe, lengths, masks, memory, disk, time: MODEL= RECIPE= GPUS= ACCELERATE=
	$(bin)hw3 check $(recipe) --run $(RUN) --show-masks 2 $(shared) $(set)

data: $(ready)  ## build data files like the homework's: CORPUS=(clone, archive, URL or parts) OUTPUT=data/homework SHA256= EXCLUDE="a.json b.json"
	$(bin)hw3 data build $(if $(CORPUS),--corpus $(CORPUS)) $(if $(SHA256),--sha256 $(SHA256)) \
		$(if $(EXCLUDE),--exclude $(EXCLUDE)) $(if $(OUTPUT),--output $(OUTPUT))

base: $(ready)  ## rebuild the base model data/tiny on one GPU: CORPUS=DIR with the parts of the public corpus
	$(bin)python tools/build_base.py build --corpus $(CORPUS) --output data/tiny

bench: $(ready)  ## run the benchmarks on one GPU: TOKENIZER=DIR with Gemma's tokenizer, EVAL=FILE with rows to score
	$(bin)python benchmarks/gpu_recipe.py --tokenizer $(TOKENIZER)
	$(bin)python benchmarks/evaluation.py --tokenizer $(TOKENIZER) --data $(if $(EVAL),$(EVAL),data/eval.json)

lint: $(ready)  ## check style, types, spelling and structure
	$(bin)ruff check .
	$(bin)ruff format --check .
	$(bin)mypy
	$(bin)codespell
	$(bin)python tools/measure_structure.py --check

format: $(ready)  ## fix style
	$(bin)ruff check --fix .
	$(bin)ruff format .

# The tests of a file may share one run of a module-scoped fixture, so a file stays on one process. Several PyTorch
# processes share the cores here, and OpenMP's threads would burn them while waiting: GOMP_SPINCOUNT bounds that.
test test-slow: export GOMP_SPINCOUNT := 20000

test: lint  ## lint, then run the tests that need no GPU and no network, and measure their coverage
	$(bin)python -m pytest -n auto --dist loadfile --cov -m "not slow and not gpu"

test-slow: lint  ## lint, then run all tests, also the slow ones and those for GPUs
	$(bin)python -m pytest

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,tools]'
	@touch $@
