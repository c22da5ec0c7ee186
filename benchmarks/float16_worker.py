"""What one process of `float16.py` does: train, score and generate in one setting with one model."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from random_models import load_shape_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback

from hw3.common.atomic_io import write_json
from hw3.config.recipe import Recipe, load_recipe
from hw3.data.rows import read_rows
from hw3.data.tokenization import EncodedRow, Encoder
from hw3.evaluation.perplexity import score_rows
from hw3.generation.batch_generate import Generation, build_generation_config, generate, get_stop_token_ids
from hw3.modeling.adapter_slot import AdapterSlot
from hw3.modeling.loading import load_base_model, load_tokenizer
from hw3.modeling.quantization import dequantize
from hw3.training.plan import plan_run
from hw3.training.train import build_trainer

STEPS, WARMUP_STEPS = 20, 12
PREDICTED_ROWS, NEW_TOKENS = 32, 48
WAIT_SECONDS = 60  # for the slowest process; without it, the others go on


@dataclass(frozen=True)
class Job:
    """What a process does.

    Attributes:
        model: `smollm2`, `gemma`, `llama` or `qwen`.
        overrides: the setting's overrides of the recipe.
        base: folder of the base model; written by the reference's process if it is random.
        layers: layers of a random base model; 0 for one that exists.
        tokenizer: folder of the tokenizer of a random base model.
        files: data files, by key of the recipe.
        folder: the run folder, for the result too.
        reference: the run folder whose adapter is used for scores and predictions.
        forbids_bf16: whether a tensor in bfloat16 is an error.
        scores: whether to score and to generate; the arithmetic does not depend on the step.
    """

    model: str
    overrides: str
    base: Path
    layers: int
    tokenizer: Path
    files: dict[str, Path]
    folder: Path
    reference: Path
    forbids_bf16: bool
    scores: bool


class Bfloat16Forbidden(TorchDispatchMode):
    """Raise an error if an operation inside the block returns a tensor in bfloat16."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.bfloat16:
                raise AssertionError(f"{function} returned bfloat16")
        return output


class _TimedSteps(TrainerCallback):
    """Time the steps after the warm-up while the other processes wait; forbid bfloat16 in the first steps."""

    def __init__(self, barrier: Any, lock: Any, forbidden: Bfloat16Forbidden | None) -> None:
        self.barrier, self.lock, self.forbidden = barrier, lock, forbidden
        self.seconds: list[float] = []
        self.started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.forbidden is not None and state.global_step == 0:
            self.forbidden.__enter__()
        if state.global_step == WARMUP_STEPS:
            torch.cuda.synchronize()
            wait_for_all(self.barrier)
            self.lock.acquire(timeout=WAIT_SECONDS)  # a process that failed may hold it
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)
        if self.forbidden is not None and state.global_step == WARMUP_STEPS - 1:
            self.forbidden.__exit__(None, None, None)
        if state.global_step == STEPS:
            self.lock.release()
            wait_for_all(self.barrier)


def wait_for_all(barrier: Any) -> None:
    """Wait for the other processes; go on if one of them failed or is late."""
    try:
        barrier.wait(WAIT_SECONDS)
    except threading.BrokenBarrierError:
        return


def enlarge_activations(model: PreTrainedModel) -> None:
    """Give a random Gemma-2 the activations of a published one: hidden states with a few very large channels.

    The embeddings write the large channels, beyond 65504. The norms remove them again and scale the rest to about 1.
    Sums inside of the MLP are large too. Norms behind attention and MLP must not write the large channels here: in
    bfloat16 the gradient of a random model would then be mostly rounding error, with TRL's step too.
    """
    hidden_size, value, rest = model.config.hidden_size, 4000.0, 20.0
    large = torch.arange(0, hidden_size, hidden_size // 4)[:4]
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings[:, large] = value * embeddings[:, large].sign()  # multiplied by the root of the hidden size
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(200)
            for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
                norm.weight.fill_(rest - 1)  # the norm multiplies by 1 plus its weight
                norm.weight[large] = -1
        norms = [
            norm for layer in model.model.layers for norm in (layer.input_layernorm, layer.pre_feedforward_layernorm)
        ]
        for norm in (*norms, model.model.norm):
            norm.weight.fill_(value * len(large) ** 0.5 / rest)  # the root mean square, divided by the rest's size
            norm.weight[large] = -1


def make_base(folder: Path, shape: str, layers: int, tokenizer: Path) -> None:
    """Write a random bfloat16 model with a shape's layers. The folder appears when it is complete."""
    part = folder.with_name(f"{folder.name}.part")
    config = load_shape_config(shape)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if shape == "gemma":
        enlarge_activations(model)
    model.save_pretrained(part)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(part)
    part.rename(folder)
    del model
    torch.cuda.empty_cache()


def build_recipe(job: Job) -> Recipe:
    """Return the recipe of a model with a setting's overrides."""
    overrides = [
        f"model.pretrained_model_name_or_path={job.base}",
        *(f"data.{key}={file}" for key, file in job.files.items()),
        "data.too_long=drop",
        f"training.max_steps={STEPS} training.save_steps={STEPS} training.logging_steps=1 training.report_to=none",
        "training.warmup_steps=0 training.learning_rate=1e-3 training.optim=adamw_torch_fused",
        job.overrides,
    ]
    return load_recipe(Path(f"recipes/{job.model}/qlora.yaml"), [word for text in overrides for word in text.split()])


def check_compiled_code() -> None:
    """Check that no compiled kernel of this process uses bfloat16."""
    from torch._inductor.codecache import PyCodeCache

    for module in PyCodeCache.modules:
        assert "bf16" not in Path(module.__file__).read_text(encoding="utf-8"), f"{module.__file__} uses bfloat16"


def train_timed(recipe: Recipe, run: Path, barrier: Any, lock: Any, *, forbids_bf16: bool) -> dict[str, Any]:
    """Train `STEPS` steps; return losses, seconds per step and memory."""
    plan = plan_run(recipe, run, 1)
    recipe, device = plan.workload.recipe, torch.device("cuda", 0)
    model = load_base_model(recipe, device)
    model = dequantize(model) if plan.strategy.dequantized else model
    trainer = build_trainer(recipe, plan.config, plan.strategy, model, plan.tokenizer, plan.rows)
    failure = trainer.capture() if plan.strategy.cuda_graphs else None
    if failure is not None:
        raise RuntimeError(f"the CUDA-graph step {failure}")
    if forbids_bf16:
        check_compiled_code()
        assert all(tensor.dtype != torch.bfloat16 for tensor in (*model.parameters(), *model.buffers()))
    forbidden = Bfloat16Forbidden() if forbids_bf16 and not plan.strategy.cuda_graphs else None
    timer = _TimedSteps(barrier, lock, forbidden)
    trainer.add_callback(timer)
    trainer.train()
    result = {
        "dtype": recipe.model.dtype,
        "cuda_graphs": plan.strategy.cuda_graphs,
        "dequantized": plan.strategy.dequantized,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "grad_norms": [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry],
        "seconds_per_step": round(min(timer.seconds[WARMUP_STEPS:]), 4),
        "median_seconds_per_step": round(statistics.median(timer.seconds[WARMUP_STEPS:]), 4),
        "seconds_capturing": round(trainer.capture_seconds, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "estimated_gib": round(plan.strategy.memory.total / 2**30, 2),
        "tokens_per_step": sum(map(len, plan.rows)) / len(plan.rows) * recipe.rows_per_step,
    }
    del trainer, model
    gc.collect()
    torch.cuda.empty_cache()
    return result


@contextmanager
def record_largest_hidden_state(model: PreTrainedModel, largest: list[float]) -> Iterator[None]:
    """Append the largest magnitude of every decoder layer's output inside the block."""
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: largest.append(float(output.abs().max())))
        for layer in model.model.layers
    ]
    yield
    for hook in hooks:
        hook.remove()


def score_and_predict(recipe: Recipe, adapter: Path, *, forbids_bf16: bool) -> dict[str, Any]:
    """Score and generate with an adapter; return the scores, the tokens and the largest hidden state."""
    base = dequantize(load_base_model(recipe, torch.device("cuda", 0)).eval())
    slot, tokenizer = AdapterSlot(base, dequantized=True), load_tokenizer(recipe.model)
    slot.load(adapter)
    encoder = Encoder(tokenizer, recipe.prompt)
    rows = [encoder.encode(row) for row in read_rows(Path(recipe.data.eval))]
    forbidden: Any = Bfloat16Forbidden() if forbids_bf16 else torch.no_grad()
    largest: list[float] = []
    with forbidden, record_largest_hidden_state(base, largest):
        scores = score_rows(slot.model, rows, tokens_per_batch=2048)
    return {
        "nlls": [score.nll for score in scores],
        "tokens": predict(slot.model, rows[:PREDICTED_ROWS], recipe, encoder.eos_token_id),
        "largest_hidden_state": max(largest),
    }


def predict(model: PreTrainedModel, rows: list[EncodedRow], recipe: Recipe, eos_token_id: int) -> list[list[int]]:
    """Return the tokens that the model generates greedily for each row."""
    config = build_generation_config(recipe.generation, get_stop_token_ids(model, eos_token_id))
    generations: dict[int, Generation] = {}
    generate(
        model,
        rows,
        max_new_tokens=[NEW_TOKENS] * len(rows),
        generation_config=config,
        on_generation=generations.__setitem__,
    )
    return [generations[index].token_ids for index in range(len(rows))]


@torch.inference_mode()
def count_plain_float16_failures(recipe: Recipe) -> int:
    """Return how many rows have a logit that is not finite if the model is float16 without float32 activations."""
    model = AutoModelForCausalLM.from_pretrained(
        recipe.model.pretrained_model_name_or_path,
        dtype=torch.float16,
        attn_implementation=recipe.model.attn_implementation,
    ).cuda()
    encoder = Encoder(load_tokenizer(recipe.model), recipe.prompt)
    rows = [encoder.encode(row) for row in read_rows(Path(recipe.data.eval))]
    return sum(not model(torch.tensor([row.input_ids]).cuda()).logits.isfinite().all() for row in rows)


def wait_for(path: Path) -> None:
    """Wait until another process has written a file or folder."""
    deadline = time.monotonic() + 2 * WAIT_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not appear")
        time.sleep(0.2)


def run_job(job: Job, barrier: Any, lock: Any) -> None:
    """Train, score and generate, and write the results so far after each."""
    if job.forbids_bf16:
        torch.cuda.is_bf16_supported = lambda including_emulation=True: False  # type: ignore[assignment]
    is_reference = job.folder == job.reference
    if is_reference and job.layers:
        make_base(job.base, job.model, job.layers, job.tokenizer)
    wait_for(job.base)
    recipe, file = build_recipe(job), job.folder / "result.json"
    try:
        result = train_timed(recipe, job.folder, barrier, lock, forbids_bf16=job.forbids_bf16)
    except BaseException:
        barrier.abort()
        raise
    write_json(file, result)
    if not job.scores:
        return
    wait_for(job.reference / "result.json")  # its adapter is complete
    dtype = result["dtype"]
    assert recipe.quantization is not None, "the recipes quantize"
    recipe = replace(
        recipe,
        model=recipe.model.model_copy(update={"dtype": dtype}),
        quantization=recipe.quantization.model_copy(update={"bnb_4bit_compute_dtype": dtype}),
    )
    adapter = job.reference / f"checkpoint-{STEPS}"
    result |= score_and_predict(recipe, adapter, forbids_bf16=job.forbids_bf16)
    write_json(file, result)
    if is_reference:
        result["rows_not_finite_in_plain_float16"] = count_plain_float16_failures(recipe)
        write_json(file, result)
