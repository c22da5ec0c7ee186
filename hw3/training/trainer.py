"""`CompletionTrainer`: TRL's `SFTTrainer` with float32 adapters, a fixed row order and atomic checkpoints."""

from __future__ import annotations

import json
import warnings
from collections import deque
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import trl.trainer.utils
from accelerate.utils import AutocastKwargs
from datasets import Dataset
from peft import LoraConfig, PeftModel
from peft.utils.other import TrainableTokensWrapper
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, set_seed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_pt_utils import nested_gather
from trl import SFTConfig, SFTTrainer

from hw3.common.atomic_io import apply_umask
from hw3.common.errors import RunError
from hw3.data.collator import CompletionOnlyCollator
from hw3.data.sampler import StepSampler
from hw3.runs.checkpoints import start_checkpoint
from hw3.training.callbacks import (
    CheckpointCompletionCallback,
    PeakMemoryCallback,
    ProgressLineCallback,
    SignalCallback,
)
from hw3.training.checkpoint_scoring import CheckpointScoringCallback
from hw3.training.cuda_graph_support import NUM_METRICS, CudaGraphStep
from hw3.training.graph_verification import VerifiedStep, capture_verified_step, cuda_graph_inputs
from hw3.training.optimizer_state import convert_optimizer_state
from hw3.training.sharding import sharding_from_env
from hw3.training.step_strategy import StepStrategy

ACCUMULATORS_FILE = "trainer_accumulators.json"
# 4-bit weights travel as bfloat16 bit patterns; a pattern that looks like NaN must be copied unchanged. With
# accelerate's own policy, FSDP2 gathers a layer's parameters as bfloat16, and PyTorch 2.11's copy of bfloat16 on a GPU
# (`_foreach_copy_`) makes every NaN the same NaN. That changes one 16-bit word in a thousand of 4-bit weights, and the
# tiny model's loss by 4 %. With this policy the float32 adapters among the parameters make FSDP2 gather bytes. Autocast
# decides in which dtype is computed.
FSDP_MIXED_PRECISION = MixedPrecisionPolicy()


class NonFiniteLossError(RunError):
    """The loss became NaN or infinite; the message names the step and its rows."""


class _PendingValue(NamedTuple):
    """A number of a step that is being copied from the GPU.

    Attributes:
        step: the step, counted from 0.
        name: what the number is.
        value: where it is copied to.
        copied: recorded after the copy.
    """

    step: int
    name: str
    value: torch.Tensor
    copied: torch.cuda.Event


def _copy_to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy on the CPU, in page-locked memory, to which a GPU copies ten times as fast."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)


class CompletionTrainer(SFTTrainer):
    """Supervised fine-tuning on encoded rows.

    The loss is TRL's: the cross-entropy summed over the output tokens and EOS of a complete optimizer step, divided by
    their number, however the step is divided into micro-batches and processes.

    Args:
        model: the base model, from `load_base_model`; `SFTTrainer` adds the adapters.
        args: TRL's arguments, from `build_sft_config`.
        train_dataset: the encoded rows, with columns `input_ids` and `labels`.
        data_collator: the collator of encoded rows.
        processing_class: the tokenizer; only its token ids are used.
        peft_config: the adapters; None for full fine-tuning.
        sampler: order of the rows.
        row_ids: ids of the rows, for messages.
        strategy: how steps are computed; the CUDA-graph step must be captured with `capture`.
        save_total_limit: number of checkpoints to keep; None for all.
    """

    # As set in `__init__`; the Trainer annotates wider types.
    model: PreTrainedModel | PeftModel
    args: SFTConfig
    train_dataset: Dataset
    data_collator: CompletionOnlyCollator
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: SFTConfig,
        train_dataset: Dataset,
        data_collator: CompletionOnlyCollator,
        processing_class: PreTrainedTokenizerBase,
        peft_config: LoraConfig | None,
        sampler: StepSampler,
        row_ids: list[str],
        strategy: StepStrategy,
        save_total_limit: int | None,
    ) -> None:
        self.sampler, self.row_ids, self.strategy = sampler, row_ids, strategy
        self.cuda_graph_step: CudaGraphStep | None = None
        self.verified_step: VerifiedStep | None = None
        self.capture_seconds = 0.0
        self._parameter_count: int | None = None
        self._pending_values: deque[_PendingValue] = deque()
        if args.device.type == "cpu":
            # Without Triton, TRL's fused head computes every position, twice the work of a step on a CPU. Its `compact`
            # mode computes output positions only, and is right on any device (trl 1.16, add_fused_lm_head).
            trl.trainer.utils._use_triton = lambda device: True
        # Adapters are initialized from the global generator, before the Trainer seeds it.
        set_seed(args.seed)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=data_collator,
            processing_class=processing_class,
            peft_config=peft_config,
        )
        self._cast_trained_parameters()
        head = self.model.get_output_embeddings()
        if isinstance(head, TrainableTokensWrapper):
            # TRL's fused head asks for the bias. The wrapper (peft 0.21.2, utils/other.py) has a weight only, and its
            # forward adds no bias.
            head.__dict__["bias"] = None
        if sharding_from_env() == "FSDP":
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = FSDP_MIXED_PRECISION
        self.checkpoints = CheckpointCompletionCallback(save_total_limit)
        self.stop, self.peak_memory = SignalCallback(), PeakMemoryCallback()
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)  # with `disable_tqdm`
        self.progress = ProgressLineCallback()
        self.scoring: CheckpointScoringCallback | None = None
        for callback in (self.progress, self.checkpoints, self.stop, self.peak_memory):
            self.add_callback(callback)

    def _cast_trained_parameters(self) -> None:
        """Make adapters float32.

        TRL 1.16 makes QLoRA adapters bfloat16. That loses updates smaller than about 0.3 % of the weight, and changes a
        resumed run, because PEFT loads adapters as float32. ZeRO-3 needs parameters of one dtype; its optimizer keeps
        float32 copies.
        """
        dtype = self.model.dtype if sharding_from_env() == "DeepSpeed" else torch.float32
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)

    # --- CUDA-graph step --------------------------------------------------------------------------------------------

    def capture(self, captured: VerifiedStep | None = None) -> str | None:
        """Capture the CUDA-graph step, and use it if it agrees with TRL's on the rows of the first step.

        Args:
            captured: a step of another run with the same base model, shapes and constants.

        Returns:
            None, or why the step is not used; the run then needs a new trainer, because the model's layers have been
            compiled.
        """
        rows = [self.train_dataset[row] for row in self.sampler.steps_in_epoch(0)[0]]
        assert isinstance(self.model, PeftModel), "the CUDA-graph step trains adapters"
        result = capture_verified_step(self.model, self.data_collator, rows, self.strategy, self.args, captured)
        self.verified_step, self.capture_seconds = result.verified, result.seconds
        self.cuda_graph_step = None if result.verified is None else result.verified.step
        return result.failure

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Compute loss and gradients with the step that was chosen; stop on a loss that is not finite."""
        step = self.cuda_graph_step
        if step is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
            self._check_finite(self.state.global_step, "loss", loss)
            return loss
        assert isinstance(num_items_in_batch, torch.Tensor), "the Trainer counts the labels of a batch that has any"
        step.start_step()
        step.accumulate(**cuda_graph_inputs(inputs), tokens=num_items_in_batch)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(step.buffer)
        loss, entropy, correct = step.buffer[-NUM_METRICS:].clone().unbind()
        metrics = self._metrics["train"]
        metrics["entropy"].append(entropy / num_items_in_batch)
        metrics["mean_token_accuracy"].append(correct / num_items_in_batch)
        self._total_train_tokens += self._count_tokens(self.state.global_step)
        metrics["num_tokens"] = [self._total_train_tokens]
        self._check_finite_later(loss, "loss")
        return loss

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        """Clip gradients as `clip_grad_norm_` does, in one tensor instead of hundreds."""
        if self.cuda_graph_step is None:
            return super()._clip_grad_norm(model)
        gradients = self.cuda_graph_step.buffer[:-NUM_METRICS]
        norm = torch.linalg.vector_norm(gradients)
        gradients.mul_((self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        self._check_finite_later(norm, "gradient norm")
        return norm

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count tokens from the rows' lengths; the Trainer's own count would wait for the GPU."""
        if self.cuda_graph_step is None:
            super()._track_num_input_tokens(inputs)
        else:
            self.state.num_input_tokens_seen += self._count_tokens(self.state.global_step)

    def _count_tokens(self, step: int) -> int:
        return sum(self.sampler.lengths[row] for row in self.sampler.rows_at_step(step))

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        """Autocast under FSDP2 too, where accelerate 1.15 does not wrap the model's forward.

        Adapters would otherwise compute in float32, on float32 copies of their inputs. Autocast's cache is off, because
        it would keep the gathered parameters of every layer.
        """
        if sharding_from_env() == "FSDP":
            return self.accelerator.autocast(AutocastKwargs(cache_enabled=False))
        return super().autocast_smart_context_manager(cache_enabled)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Compute `PreTrainedModel.floating_point_ops` without counting all parameters at every step."""
        if self._parameter_count is None:
            self._parameter_count = self.accelerator.unwrap_model(self.model).num_parameters(exclude_embeddings=True)
        return 6 * inputs["input_ids"].numel() * self._parameter_count

    # --- non-finite values and metrics ------------------------------------------------------------------------------

    def _check_finite(self, step: int, name: str, value: torch.Tensor) -> None:
        """Check a number of a step, counted from 0.

        Raises:
            NonFiniteLossError: the number is NaN or infinite.
        """
        if not torch.isfinite(value):
            rows = ", ".join(self.row_ids[row] for row in self.sampler.rows_at_step(step))
            raise NonFiniteLossError(
                f"the {name} of step {step + 1} is {value.item()}; its rows: {rows}. Checkpoints that were complete "
                "before are intact. A lower learning_rate or max_grad_norm, or float32, usually helps"
            )

    def _check_finite_later(self, value: torch.Tensor, name: str) -> None:
        """Start to copy a number from the GPU, and check those that have arrived, without waiting for others."""
        copy = torch.empty((), pin_memory=True)
        copy.copy_(value, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending_values.append(_PendingValue(self.state.global_step, name, copy, event))
        while self._pending_values and self._pending_values[0].copied.query():
            pending = self._pending_values.popleft()
            self._check_finite(pending.step, pending.name, pending.value)

    def _flush_metrics(self) -> None:
        """Wait for all numbers that are still on the GPU: check them, and turn metrics into Python numbers."""
        while self._pending_values:
            pending = self._pending_values.popleft()
            pending.copied.synchronize()
            self._check_finite(pending.step, pending.name, pending.value)
        for key, values in self._metrics["train"].items():
            if values and isinstance(values[-1], torch.Tensor):
                tensors = [value for value in values if isinstance(value, torch.Tensor)]
                numbers = iter(torch.stack(tensors).tolist())
                self._metrics["train"][key] = [
                    next(numbers) if isinstance(value, torch.Tensor) else value for value in values
                ]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; TRL averages the metrics and needs Python numbers."""
        self._flush_metrics()
        super().log(logs, start_time)

    # --- row order and resuming -------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> StepSampler:
        """Return the run's own sampler, whose order does not depend on the number of processes."""
        return self.sampler

    # The Trainer passes every argument by name.
    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:  # type: ignore[override]
        """Set the sampler's epoch; on resume restore what the Trainer has just reset."""
        self.sampler.set_epoch(epoch)
        if kwargs["resume_from_checkpoint"] is not None and epoch == kwargs["epochs_trained"]:
            self._restore_accumulators(Path(kwargs["resume_from_checkpoint"]))
        super()._run_epoch(epoch=epoch, **kwargs)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """Restore TRL's token count; recompute the intervals of logging and saving, which a resumed run may change."""
        trained = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)
        self._total_train_tokens = self.state.num_input_tokens_seen
        self.state.compute_steps(self.args, max_steps)
        return trained

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Convert the optimizer's state: a run may be resumed with another `speed`, whose AdamW stores it differently.

        The optimizer's `load_state_dict` is replaced during the call, so that super() loads the converted state.
        The state of a sharded run is loaded by parameter name, into an optimizer of the same kind.
        """
        if sharding_from_env() is not None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_state_dict = self.optimizer.load_state_dict

        def convert_and_load(state_dict: dict[str, Any]) -> None:
            load_state_dict(convert_optimizer_state(self.optimizer, state_dict))

        # Replaced for this call only.
        self.optimizer.load_state_dict = convert_and_load  # type: ignore[method-assign]
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        finally:
            self.optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign]

    def _restore_accumulators(self, checkpoint: Path) -> None:
        """Restore sums that had not been logged yet, so that the next log line is that of an uninterrupted run."""
        accumulators = json.loads((checkpoint / ACCUMULATORS_FILE).read_text(encoding="utf-8"))
        self._tr_loss += accumulators["loss"]
        self._globalstep_last_logged = accumulators["logged_at"]
        self._metrics["train"].update({key: list(values) for key, values in accumulators["metrics"].items()})

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, and wait until the last checkpoint is complete."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.checkpoints.wait()

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save the sums that have not been logged yet as well."""
        self.checkpoints.wait()
        self._flush_metrics()
        if self.args.should_save:
            start_checkpoint(self._checkpoint_dir())
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        accumulators = {
            "loss": nested_gather(self._tr_loss, self.args.parallel_mode).mean().item(),
            "logged_at": self._globalstep_last_logged,
            "metrics": dict(self._metrics["train"]),
        }
        if self.args.should_save:
            folder = self._checkpoint_dir()
            (folder / ACCUMULATORS_FILE).write_text(json.dumps(accumulators), encoding="utf-8")
            # DeepSpeed adds scripts for checkpoints that have no adapter file.
            for script in ("zero_to_fp32.py", "zero_to_torch.py"):
                (folder / script).unlink(missing_ok=True)

    def _checkpoint_dir(self) -> Path:
        assert self.args.output_dir is not None, "`build_sft_config` sets the run folder"
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save without tokenizer (34 MB; the run folder has it once), pickled arguments and empty model card."""
        tokenizer, self.processing_class = self.processing_class, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.processing_class = tokenizer
        if self.args.should_save:
            assert self.args.output_dir is not None, "`build_sft_config` sets the run folder"
            folder = Path(output_dir or self.args.output_dir)
            for name in ("training_args.bin", "README.md"):
                (folder / name).unlink(missing_ok=True)
            apply_umask(folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """With the CUDA-graph step, write the optimizer's state from a copy while training continues."""
        if self.cuda_graph_step is None:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            folder = Path(output_dir)
            state = tree_map_only(torch.Tensor, _copy_to_cpu, self.optimizer.state_dict())
            self.checkpoints.defer_write(lambda: torch.save(state, folder / OPTIMIZER_NAME))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch warns that the optimizer's state must be saved as well
                torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no model card: TRL would write one at every checkpoint; `hw3 export` writes the project's."""
