"""TRL's `SFTTrainer` with float32 adapters, rows fixed by the seed, and checkpoints that are whole or not there."""

from __future__ import annotations

import gc
import json
import logging
import time
import warnings
from collections import deque
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils
from accelerate.utils import AutocastKwargs
from accelerate.utils import send_to_device as move_to_device
from datasets import Dataset
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, set_seed
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_pt_utils import nested_gather
from trl import SFTConfig, SFTTrainer

from hw3.common.atomic_io import open_to_others
from hw3.common.errors import RunFailed, first_line
from hw3.config.recipe import Recipe
from hw3.cuda_graphs.training_step import SUMS, CapturedStep, unallocated_bytes
from hw3.data.collator import CompletionOnlyCollator
from hw3.data.sampler import StepSampler
from hw3.data.tokenization import IGNORE_INDEX, EncodedRow
from hw3.modeling.adapter_slot import lora_config
from hw3.training.callbacks import CompleteCheckpoints, PeakMemory, ProgressLine, StopOnSignal
from hw3.training.memory_estimate import GIB
from hw3.training.optimizer_state import as_states_of
from hw3.training.sharding import sharded_by
from hw3.training.step_strategy import HEADROOM, Speed

ACCUMULATED = "accumulated.json"
# How far loss and gradient of the captured step may be from TRL's on the first batch, relative. Rounding in bfloat16
# alone makes 1e-4 and 0.03 in a 2B model, 5e-3 of loss in the tiny one. The adapters are drawn anew for it, with this
# standard deviation.
PROBE_LOSS, PROBE_GRADIENT, PROBE_STD = 0.02, 0.15, 0.02
# Autocast decides in what is computed. With accelerate's own policy FSDP2 gathers a layer's parameters as bfloat16, and
# PyTorch's copy of that on a GPU makes every NaN the same one: of packed 4-bit weights one word in a thousand, 4 % of
# the tiny model's loss (torch 2.11, `_foreach_copy_`). With float32 adapters among them it gathers bytes.
SHARDED_POLICY = MixedPrecisionPolicy()


class NonFiniteLoss(RunFailed):
    """The loss became NaN or infinite; the message names the step and its rows."""


def _step_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What `CapturedStep.add` takes of a batch."""
    names = ("input_ids", "attention_mask", "output_positions", "output_ids", "outputs_per_row")
    return {name: batch[name] for name in names}


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, through page-locked memory, which a GPU fills ten times as fast."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)


class CompletionTrainer(SFTTrainer):
    """Supervised fine-tuning on encoded rows.

    The loss is TRL's: cross-entropy summed over output tokens and EOS of a whole optimizer step, divided by their
    number, whatever the micro-batches and processes.

    Args:
        recipe: the run's recipe.
        config: from `sft_config`.
        speed: how a step is made; `capture` makes good on `captured`.
        model: the base, from `load_base`; adapters are added here.
        tokenizer: for its ids only; rows are encoded already.
        rows: encoded training rows.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: SFTConfig,
        speed: Speed,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: list[EncodedRow],
    ) -> None:
        self.row_ids = [row.id for row in rows]
        self.speed = speed
        self.captured_step: CapturedStep | None = None
        layout = speed.layout
        self.sampler = StepSampler(
            [len(row) for row in rows], layout.processes * layout.rows_per_device * layout.accumulation, recipe.seed
        )
        if config.device.type == "cpu":
            # TRL's fused head takes every position on devices without Triton, twice the work of a CPU step; its
            # `compact` way, outputs only, is right on any device (trl 1.16, add_fused_lm_head).
            trl.trainer.utils._use_triton = lambda device: True
        # Adapters are initialized from the global generator, before the Trainer seeds it.
        set_seed(recipe.seed)
        super().__init__(
            model=model,
            args=config,
            train_dataset=Dataset.from_dict(
                {"input_ids": [row.input_ids for row in rows], "labels": [row.labels for row in rows]}
            ),
            processing_class=tokenizer,
            peft_config=None if recipe.lora is None else lora_config(recipe.lora),
            data_collator=CompletionOnlyCollator(
                tokenizer.pad_token_id, tokenizer.eos_token_id, speed.widths, outputs=speed.captured
            ),
        )
        # TRL makes QLoRA adapters bfloat16, which loses updates under a few 1e-3 of a weight and, since PEFT loads them
        # back as float32, makes a resumed run another one. ZeRO-3 takes parameters of one dtype alone; its optimizer
        # has float32 copies.
        dtype = self.model.dtype if sharded_by() == "DeepSpeed" else torch.float32
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        if sharded_by() == "FSDP":
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = SHARDED_POLICY
        self.remove_callback(ProgressCallback)
        self.add_callback(ProgressLine())
        self.checkpoints = CompleteCheckpoints(self, recipe.training.get("save_total_limit"))
        self.add_callback(self.checkpoints)
        self.stop = StopOnSignal(self)
        self.add_callback(self.stop)
        self.peak_memory = PeakMemory()
        self.add_callback(self.peak_memory)
        self.seconds_capturing = 0.0
        self._counted_parameters: int | None = None
        self._unread: deque[tuple[int, str, torch.Tensor, torch.cuda.Event]] = deque()

    def capture(self) -> str | None:
        """Capture the step, and run the first step's rows both ways.

        Returns:
            None if both agree and memory is left; else why TRL's own step must be taken, with a new trainer.
        """
        try:
            problem = self._capture()
        except Exception as error:  # a compiler, a driver or memory that fails here is no reason to fail the run
            logging.getLogger(__name__).debug("capturing the step failed", exc_info=True)
            problem = f"failed here: {type(error).__name__}: {first_line(error)[:200]}"
        if self.args.world_size > 1:
            # All processes take the same way.
            problems: list[str | None] = [None] * self.args.world_size
            torch.distributed.all_gather_object(problems, problem)
            problem = next((found for found in problems if found is not None), None)
        if problem is not None:
            self.captured_step = None
        return problem

    def _capture(self) -> str | None:
        device, per_process = self.args.device, self.speed.layout.rows_per_device
        first = self.args.process_index * per_process
        rows = [self.train_dataset[row] for row in self.sampler.steps(0)[0]]
        tokens = sum(label != IGNORE_INDEX for row in rows for label in row["labels"])
        own = rows[first : first + per_process]
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        saved = [parameter.detach().to("cpu", copy=True) for parameter in trained]
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # The B of a new adapter is zero, and nothing would come through it.
            for parameter in trained:
                parameter.data.normal_(std=PROBE_STD)
            try:
                loss, gradient = self._plain_sums(own, tokens)
                began = time.monotonic()
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", category=UserWarning, module="torch._inductor")
                    step = CapturedStep(self.model, per_process, self.speed.widths, self.speed.replayed)
                    step.begin()
                    batch = move_to_device(self.data_collator(own), device)
                    step.add(**_step_inputs(batch), tokens=torch.tensor(tokens, device=device))
                ours, gradient_of_ours = step.buffer[-SUMS].item(), self._gradient(trained)
                self.seconds_capturing = time.monotonic() - began
            finally:
                for parameter, before in zip(trained, saved, strict=True):
                    parameter.data.copy_(before)
                    parameter.grad = None
        if not abs(ours - loss) <= (PROBE_LOSS if not self._drops_out() else 0.05) * loss:
            return f"has a loss of {ours:.5f} in the first step, not {loss:.5f}"
        if self._drops_out():
            # Other draws: the gradient's size is all that can be compared.
            apart, bound = abs(gradient_of_ours.norm() / gradient.norm() - 1).item(), 0.5
        else:
            apart, bound = ((gradient_of_ours - gradient).norm() / gradient.norm()).item(), PROBE_GRADIENT
        if not apart <= bound:
            return f"has a gradient in the first step that is {apart:.1%} from TRL's"
        if (problem := self._short_of_memory()) is not None:
            return problem
        self.captured_step = step
        return None

    def _drops_out(self) -> bool:
        dropout = any(isinstance(module, torch.nn.Dropout) and module.p for module in self.model.modules())
        return dropout or bool(getattr(self.model.config, "attention_dropout", 0))

    def _plain_sums(self, rows: list[dict[str, Any]], tokens: int) -> tuple[float, torch.Tensor]:
        """Loss of rows by TRL's forward, and its gradient; one row at a time to spare memory.

        No collective: a process that fails here must not leave the others waiting.
        """
        collate = CompletionOnlyCollator(self.data_collator.pad_id, self.data_collator.eos_id)
        device, loss, dtype = self.args.device, 0.0, self.model.dtype
        self.model.train()
        for row in rows:
            batch = move_to_device(collate([row]), device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                outputs = self.model(**batch, use_cache=False, fused_lm_head=True)
            part = -outputs.log_probs.sum() / tokens
            part.backward()
            loss += part.item()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gradient = self._gradient(trained)
        for parameter in trained:
            parameter.grad = None
        del batch, outputs, part
        gc.collect()  # a forward's cycles would hold on to its memory while the graphs are made
        torch.cuda.empty_cache()
        return loss, gradient

    @staticmethod
    def _gradient(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        """Gradients end to end, out of the GPU's way."""
        return torch.cat([parameter.grad.flatten().cpu() for parameter in parameters])

    def _short_of_memory(self) -> str | None:
        """Whether the captured graphs leave less than they must, the optimizer's states to come counted in."""
        device = self.args.device
        free, total = torch.cuda.mem_get_info(device)
        # What the graphs' own pool holds, nothing else can use.
        left = free + unallocated_bytes(device, of_graphs=False) - self.speed.memory.optimizer
        if left >= HEADROOM * total:
            return None
        return f"would leave {left / GIB:.1f} of {total / GIB:.1f} GiB free, less than {HEADROOM:.0%}"

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> StepSampler:
        return self.sampler

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:
        self.sampler.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, **kwargs)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        trained = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)
        self._total_train_tokens = self.state.num_input_tokens_seen  # TRL's own count starts at 0 again
        self.state.compute_steps(self.args, max_steps)  # a resumed run may save and log at other steps
        return trained

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.captured_step is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
            self._check_finite(self.state.global_step, loss)
            return loss
        self.captured_step.begin()
        self.captured_step.add(**_step_inputs(inputs), tokens=num_items_in_batch)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(self.captured_step.buffer)
        loss, entropy, hits = self.captured_step.buffer[-SUMS:].clone().unbind()
        metrics = self._metrics["train"]
        metrics["entropy"].append(entropy / num_items_in_batch)
        metrics["mean_token_accuracy"].append(hits / num_items_in_batch)
        self._total_train_tokens += self._tokens_of(self.state.global_step)
        metrics["num_tokens"] = [self._total_train_tokens]
        self._check_finite_later(loss, "loss")
        return loss

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        # accelerate gives a model's forward autocast, but not under FSDP2: adapters would compute in float32, from
        # float32 copies of what goes in. A cache would keep what every layer has gathered.
        if sharded_by() == "FSDP":
            return self.accelerator.autocast(AutocastKwargs(cache_enabled=False))
        return super().autocast_smart_context_manager(cache_enabled)

    def _check_finite(self, step: int, value: torch.Tensor, name: str = "loss") -> None:
        """
        Raises:
            NonFiniteLoss: the loss, or gradient norm, of this step, counted from 0, is NaN or infinite.
        """
        if not torch.isfinite(value):
            rows = ", ".join(self.row_ids[row] for row in self.sampler.rows_of(step))
            raise NonFiniteLoss(
                f"the {name} of step {step + 1} is {value.item()}; its rows: {rows}. Checkpoints written "
                "before are intact. A lower learning_rate or max_grad_norm, or float32, usually helps"
            )

    def _check_finite_later(self, value: torch.Tensor, name: str) -> None:
        """Look at the numbers that have come back from the device, and do not wait for those that have not."""
        copy = torch.empty((), pin_memory=True)
        copy.copy_(value, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._unread.append((self.state.global_step, name, copy, event))
        while self._unread and self._unread[0][3].query():
            step, name, copy, _ = self._unread.popleft()
            self._check_finite(step, copy, name)

    def _read_all(self) -> None:
        """Wait for every number that is still on the device."""
        while self._unread:
            step, name, copy, event = self._unread.popleft()
            event.synchronize()
            self._check_finite(step, copy, name)
        for key, values in self._metrics["train"].items():
            if values and isinstance(values[-1], torch.Tensor):
                tensors = [value for value in values if isinstance(value, torch.Tensor)]
                numbers = iter(torch.stack(tensors).tolist())
                self._metrics["train"][key] = [
                    next(numbers) if isinstance(value, torch.Tensor) else value for value in values
                ]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._read_all()
        super().log(logs, start_time)

    def _tokens_of(self, step: int) -> int:
        return sum(self.sampler.lengths[row] for row in self.sampler.rows_of(step))

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        if self.captured_step is None:
            super()._track_num_input_tokens(inputs)
        else:
            # The same count as the Trainer's, which waits for the device to tell it.
            self.state.num_input_tokens_seen += self._tokens_of(self.state.global_step)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # As `PreTrainedModel.floating_point_ops`, which counts all parameters anew at every step.
        if self._counted_parameters is None:
            self._counted_parameters = self.accelerator.unwrap_model(self.model).num_parameters(exclude_embeddings=True)
        return 6 * inputs["input_ids"].numel() * self._counted_parameters

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        if self.captured_step is None:
            return super()._clip_grad_norm(model)
        # As `clip_grad_norm_`, on one tensor instead of hundreds.
        gradients = self.captured_step.buffer[:-SUMS]
        norm = torch.linalg.vector_norm(gradients)
        gradients.mul_((self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        self._check_finite_later(norm, "gradient norm")
        return norm

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if sharded_by() is not None:  # of a run of the same kind, and given by name
            return super()._load_optimizer_and_scheduler(checkpoint)
        # A run may be resumed under another `speed`, whose AdamW names its states in other words.
        load = self.optimizer.load_state_dict
        self.optimizer.load_state_dict = lambda state: load(as_states_of(self.optimizer, state))
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        finally:
            self.optimizer.load_state_dict = load

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # The run folder holds the tokenizer once; a checkpoint needs no 34 MB copy, pickled arguments or empty card.
        tokenizer, self.processing_class = self.processing_class, None
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.processing_class = tokenizer
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            for name in ("training_args.bin", "README.md"):
                (folder / name).unlink(missing_ok=True)
            open_to_others(folder)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            self.checkpoints.wait()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.captured_step is None:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            # The same files; the large one is written while training goes on, from a copy.
            folder, state = Path(output_dir), tree_map_only(torch.Tensor, _on_cpu, self.optimizer.state_dict())
            self.checkpoints.before_completing(lambda: torch.save(state, folder / OPTIMIZER_NAME))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns that the optimizer's state should be saved as well
                torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.checkpoints.wait()
        self._read_all()
        super()._save_checkpoint(model, trial)
        accumulated = {
            "loss": nested_gather(self._tr_loss, self.args.parallel_mode).mean().item(),
            "logged_at": self._globalstep_last_logged,
            "metrics": dict(self._metrics["train"]),
        }
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            (folder / ACCUMULATED).write_text(json.dumps(accumulated), encoding="utf-8")
            # DeepSpeed's, for checkpoints that have no adapter file.
            for script in ("zero_to_fp32.py", "zero_to_torch.py"):
                (folder / script).unlink(missing_ok=True)

    def restore_accumulated(self, checkpoint: Path) -> None:
        """Take up sums that the checkpoint's run had not logged yet, so that the next log line is as without a stop."""
        accumulated = json.loads((checkpoint / ACCUMULATED).read_text(encoding="utf-8"))
        self._tr_loss += accumulated["loss"]
        self._globalstep_last_logged = accumulated["logged_at"]
        self._metrics["train"].update({key: list(values) for key, values in accumulated["metrics"].items()})

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL writes a card of its own into the run folder at every checkpoint; `hw3 export` writes ours."""
