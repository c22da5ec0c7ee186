"""How long a run will take: a few of its steps on a base of the same shape with fewer decoder layers, random weights.

Time grows by the same amount with every decoder layer, so a run of one layer and one of a few more tell that of all.
They are runs of the real trainer on the run's own rows, in the way that `choose_speed` chose. The captured step is not
compiled here, which takes a minute: its graphs are timed as they are, matrix products on their own, and `FUSED` says
what compiling leaves of the rest.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft.tuners.lora.layer import Linear as PeftLinear
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from hw3.common.errors import RunFailed, first_line
from hw3.config.recipe import Recipe
from hw3.cuda_graphs.fused_lora import LoraLinears, adapter_weights, replaceable
from hw3.data.sampler import StepSampler
from hw3.data.tokenization import EncodedRow
from hw3.modeling.loading import attention_of, load_config, prepare_for_training
from hw3.modeling.quantization import quantization_config
from hw3.training.batch_layout import StepLayout
from hw3.training.callbacks import ProgressLine
from hw3.training.sft_arguments import sft_config
from hw3.training.step_strategy import Speed
from hw3.training.trainer import CompletionTrainer


def random_base(recipe: Recipe, config: Any, layers: int, device: torch.device, *, packed: bool) -> PreTrainedModel:
    """The recipe's base as `load_base` has it, with random weights and another number of layers; nothing is read.

    Args:
        recipe: the recipe.
        config: the base's configuration.
        layers: decoder layers, of the kinds that the base begins with.
        device: where it is made.
        packed: 4-bit layers where the recipe quantizes; else plain ones, as `dequantize` leaves them.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = (text.layer_types * layers)[:layers]
    options: dict[str, Any] = {
        "dtype": getattr(torch, recipe.model.dtype),
        "attn_implementation": attention_of(recipe.model),
    }
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, **options)
    if packed and recipe.quantization is not None:
        transformers.utils.logging.disable_progress_bar()
        # Weights are packed while they are loaded, from memory too.
        model = type(model).from_pretrained(
            None,
            config=config,
            state_dict=model.state_dict(),
            quantization_config=quantization_config(recipe.quantization),
            device_map={"": device},
            **options,
        )
    return prepare_for_training(model)


# By whether the step is captured: CPUs, which set the pace of one that is not, keep time less well than GPUs.
LAYERS = {True: (1, 3), False: (1, 6)}
STEPS = 6  # of like steps of the run: from its shortest rows to its longest, so that their mean is the run's
PASSES = 3  # over these steps: one that loads every kernel, one by the clock, one by the GPU's own
# Of the time that is neither matrix products nor the optimizer's, what compiling leaves, by benchmarks/train_step.py.
FUSED = 0.35
FIRST_STEP = {True: 40, False: 10}  # seconds until the first step, by whether it is captured: imports, compiling


@dataclass(frozen=True)
class Timing:
    """Seconds a step as it was timed, by number of decoder layers.

    Attributes:
        wall: by the clock, everything.
        graphs: captured step alone: forward, head and backward, not compiled, on the GPU.
        optimizer: captured step alone: the optimizer's step, on the GPU.
        products: captured step alone: matrix products of one layer, and those of the head.
    """

    wall: dict[int, float]
    graphs: dict[int, float]
    optimizer: dict[int, float]
    products: tuple[float, float] = (0.0, 0.0)

    def seconds_per_step(self, layers: int) -> float:
        """Seconds of a step with this many layers."""
        if not self.graphs:
            return in_all(self.wall, layers)
        products = self.products[0] * layers + self.products[1]
        rest = max(0.0, in_all(self.graphs, layers) - products)
        # The GPU works while the CPU prepares the next step; the slower of the two sets the pace.
        return max(products + FUSED * rest + in_all(self.optimizer, layers), min(self.wall.values()))


def in_all(timed: dict[int, float], layers: int) -> float:
    """What two numbers of layers take, carried on in a straight line to another; more layers never take less."""
    (few, first), (more, second) = sorted(timed.items())
    return first + max(0.0, second - first) / (more - few) * (layers - few)


def like_steps(rows: Sequence[EncodedRow], rows_per_step: int, seed: int) -> list[list[int]]:
    """Some steps of the run's first epoch, as indices of rows: from the fewest tokens to the most, evenly."""
    lengths = [len(row) for row in rows]
    drawn = StepSampler(lengths, rows_per_step, seed).steps(0)
    drawn = sorted(drawn, key=lambda step: sum(lengths[row] for row in step))
    return [drawn[int((place + 0.5) * len(drawn) / STEPS)] for place in range(STEPS)]


def probe(
    recipe: Recipe, speed: Speed, tokenizer: PreTrainedTokenizerBase, rows: list[EncodedRow], device: torch.device
) -> Timing:
    """Time some steps of a run; on one GPU, whatever the number of processes.

    Args:
        recipe: the recipe.
        speed: from `choose_speed`.
        tokenizer: the base's.
        rows: encoded training rows.
        device: where the run will be.

    Raises:
        RunFailed: the captured step does not work here.
    """
    layout = speed.layout
    own = layout.rows_per_device * layout.accumulation
    # The first process takes the longest rows of a step, and the others wait for it.
    chosen = [rows[row] for step in like_steps(rows, recipe.rows_per_step, recipe.seed) for row in step[:own]]
    speed = replace(speed, layout=StepLayout(1, layout.rows_per_device, layout.accumulation))
    outputs = sum(len(row.output_ids) for row in chosen) / STEPS
    wall, graphs, optimizer, products = {}, {}, {}, (0.0, 0.0)
    for layers in LAYERS[speed.captured]:
        with tempfile.TemporaryDirectory() as folder, _uncompiled(speed.captured):
            trainer = _trainer(recipe, speed, tokenizer, chosen, device, layers, Path(folder))
            if speed.captured and (reason := trainer.capture()):
                raise RunFailed(f"the captured step {reason}")
            trainer.train()
            wall[layers] = trainer.clock.seconds_per_step()
            if speed.captured:
                graphs[layers] = statistics.mean(trainer.graph_seconds)
                optimizer[layers] = statistics.mean(trainer.optimizer_seconds)
                products = _products(trainer.model, round(statistics.mean(trainer.tokens)), round(outputs))
            trainer.accelerator.free_memory()
            del trainer
            _release(device)
    return Timing(wall, graphs, optimizer, products)


def time_of_run(recipe: Recipe, speed: Speed, tokenizer: Any, rows: list[EncodedRow], steps: int) -> str:
    """A line on how long `steps` steps will take on this GPU, or on why that could not be told.

    Args:
        recipe: the recipe.
        speed: from `choose_speed`.
        tokenizer: the base's.
        rows: encoded training rows.
        steps: that are to be trained.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    layers = load_config(recipe.model).get_text_config().num_hidden_layers
    try:
        step = probe(recipe, speed, tokenizer, rows, device).seconds_per_step(layers)
    except Exception as error:  # memory, a driver, a compiler: a time that is not told is no reason to tell nothing
        _release(device)
        return f"the time of the run could not be told: {type(error).__name__}: {first_line(error)[:200]}"
    others = "" if speed.layout.processes == 1 else ", the processes' exchange not counted"
    return in_words(steps, step, torch.cuda.get_device_name(device), speed.captured) + others


def in_words(steps: int, seconds_per_step: float, gpu: str, captured: bool) -> str:
    """The line that tells a run's time, its first step's preparation counted in."""
    before = FIRST_STEP[captured]
    wait = f"; the first comes after about {before} s"
    few, more = LAYERS[captured]
    how = f"{seconds_per_step:.2g} s each, from a probe of {few} and {more} layers"
    return f"about {duration(before + steps * seconds_per_step)} on {gpu}: {steps} steps of {how}{wait}"


def duration(seconds: float) -> str:
    """`50 s`, `12 min`, `1 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


class _Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self._ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._ends.append(time.perf_counter())

    def seconds_per_step(self) -> float:
        """Of the second pass."""
        return (self._ends[2 * STEPS - 1] - self._ends[STEPS - 1]) / STEPS


class _ProbedTrainer(CompletionTrainer):
    """Keeps quiet, and times what the GPU does in captured steps of the last pass."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.clock = _Clock()
        self.tokens: list[int] = []
        self.graph_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []
        for callback in (ProgressLine, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(self.clock)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        step = super().training_step
        loss = step(model, inputs, num_items_in_batch)
        if self.captured_step is not None and self.state.global_step >= (PASSES - 1) * STEPS:
            self.tokens.append(inputs["input_ids"].numel())
            self.graph_seconds.append(_gpu_seconds(lambda: step(model, inputs, num_items_in_batch)))
            self.optimizer_seconds.append(_gpu_seconds(self.optimizer.step))
        return loss


def _trainer(
    recipe: Recipe,
    speed: Speed,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[EncodedRow],
    device: torch.device,
    layers: int,
    folder: Path,
) -> _ProbedTrainer:
    """The run's trainer on a few of its rows and layers; it writes, logs and reports nothing."""
    quiet = {
        "max_steps": STEPS * (PASSES if speed.captured else PASSES - 1),
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    recipe = replace(recipe, training={**recipe.training, **quiet})
    model = random_base(recipe, load_config(recipe.model), layers, device, packed=not speed.dequantized)
    return _ProbedTrainer(recipe, sft_config(recipe, speed, folder), speed, model, tokenizer, rows)


@contextlib.contextmanager
def _uncompiled(captured: bool) -> Iterator[None]:
    if not captured:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _products(model: Any, tokens: int, outputs: int) -> tuple[float, float]:
    """GPU seconds of a step's matrix products, forward and backward: (of the first decoder layer, of the head)."""
    device, dtype = model.device, model.dtype
    base = model.get_base_model()
    decoder_layer = base.base_model.layers[0]
    groups = [[layer for *_, layer in group] for group in replaceable(decoder_layer)]
    linears: list[torch.nn.Module] = [LoraLinears(group, *_adapters(group, dtype)) for group in groups]
    replaced = {id(layer) for group in groups for layer in group}
    others = [linear for linear in _linears(decoder_layer) if id(linear) not in replaced]
    linears += [linear.to(dtype) for linear in others]
    widths = [layers[0].in_features for layers in [*groups, *([linear] for linear in others)]]
    inputs = [torch.randn(tokens, width, device=device, dtype=dtype) for width in widths]

    def layer() -> None:
        for linear, x in zip(linears, inputs, strict=True):
            x.requires_grad_()
            y = linear(x)
            y = list(y) if isinstance(linear, LoraLinears) else [y]
            trained = [parameter for parameter in linear.parameters() if parameter.requires_grad]
            torch.autograd.grad(y, [x, *trained], [torch.ones_like(part) for part in y])

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        layer()
    weight = base.get_output_embeddings().weight.detach()
    states = torch.randn(min(outputs, 512), weight.shape[1], device=device, dtype=dtype)
    head = _gpu_seconds(lambda: (states @ weight.T) @ weight) * outputs / len(states)
    return _gpu_seconds(graph.replay), head


def _adapters(layers: list[Any], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """A and B of layers of one input, as `LoraLinears` takes them."""
    joined = (torch.cat([part.detach() for part in side]) for side in adapter_weights(layers))
    return [torch.nn.Parameter(weight.to(dtype)) for weight in joined]


def _linears(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Linear layers, with their adapters where they have any."""
    if isinstance(module, PeftLinear | torch.nn.Linear):
        yield module
        return
    for child in module.children():
        yield from _linears(child)


def _gpu_seconds(work: Callable[[], Any], times: int = 5) -> float:
    """Seconds that the GPU takes for some work, the first time not counted; the CPU runs ahead."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    work()
    begin.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
