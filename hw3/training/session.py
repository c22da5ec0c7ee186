"""Train several runs in one process, each as a process of its own would: base model and CUDA graphs are kept."""

from __future__ import annotations

import copy
import gc
import json
from typing import Any

import torch
from transformers import PreTrainedModel

from hw3.common.distributed import get_world_size
from hw3.modeling.adapter_slot import build_lora_config, uses_only_own_tensors
from hw3.modeling.devices import select_device
from hw3.modeling.loading import load_base_model
from hw3.modeling.quantization import dequantize
from hw3.training.graph_verification import VerifiedStep
from hw3.training.plan import Plan, PlanCache


class TrainingSession:
    """What the runs of one process share: the base model, the captured CUDA-graph step, tokenizer and encoded rows.

    A run takes the base model as it was loaded. `restore` removes the run's adapters and everything else that PEFT, TRL
    and the compiler have changed in it. The next run takes it again if its base model, quantization and dtype are the
    same and its adapters leave the base's weights unchanged. If not, the base is loaded again.

    Attributes:
        cache: results of the runs' checks.
        captured_step: the step that was captured last; None if it cannot be used for the present run.
        plan: the plan of the run that has taken the base model last; None before the first.
    """

    def __init__(self) -> None:
        self.cache = PlanCache()
        self.captured_step: VerifiedStep | None = None
        self.plan: Plan | None = None
        self._base: PreTrainedModel | None = None
        self._snapshot: ModuleSnapshot | None = None
        self._base_key = self._step_key = ""

    def take_base(self, plan: Plan) -> PreTrainedModel:
        """Return the base model of a run, without a trace of the runs before."""
        if self._base is None or self._base_key != _base_key(plan):
            self.discard()
            recipe = plan.workload.recipe
            base = load_base_model(recipe, select_device(recipe))
            self._base = dequantize(base) if plan.strategy.dequantized else base
            self._base_key = _base_key(plan)
            self._snapshot = ModuleSnapshot(self._base) if _leaves_base_unchanged(plan) else None
        else:
            if self._step_key not in ("", _step_key(plan)):
                self._drop_step()
            # What is left of earlier runs stays until step or base are dropped. Frozen, these million objects are not
            # visited by every later collection, such as accelerate's at the start of training.
            gc.collect()
            gc.freeze()
        self.plan = plan
        if self._base.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return self._base

    def keep_step(self, plan: Plan, step: VerifiedStep | None) -> None:
        """Keep a captured step for runs whose steps have the same shapes and constants."""
        self.captured_step, self._step_key = step, _step_key(plan)

    def restore(self) -> None:
        """Remove the adapters and all other changes of a run from the base model. Nothing of the run may be used."""
        if self._snapshot is None:
            self.discard()
        else:
            self._snapshot.restore()
        gc.collect()  # PEFT's layers and hooks refer to each other

    def discard(self) -> None:
        """Forget base model and captured step, and free their memory."""
        self._base = self._snapshot = None
        self._base_key = ""
        self._drop_step()

    def _drop_step(self) -> None:
        self.captured_step, self._step_key = None, ""
        gc.unfreeze()
        gc.collect()
        torch._dynamo.reset()
        torch.cuda.empty_cache()


class ModuleSnapshot:
    """The structure of a model: its modules with their attributes, hooks and configuration; not the weights' values.

    Args:
        model: the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._modules = [(module, type(module), _copy_tables(module.__dict__)) for module in model.modules()]
        self._requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        configs = (model.config, model.generation_config)
        self._configs = [(config, copy.deepcopy(config.__dict__)) for config in configs if config is not None]

    def restore(self) -> None:
        """Give every module, configuration and parameter the attributes that it had; gradients are removed."""
        for module, module_class, attributes in self._modules:
            module.__class__ = module_class
            module.__dict__.clear()
            module.__dict__.update(_copy_tables(attributes))
        for parameter, requires_grad in self._requires_grad:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None
        for config, values in self._configs:
            config.__dict__.clear()
            config.__dict__.update(copy.deepcopy(values))


def _copy_tables(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return a module's attributes, with copies of its tables of submodules, parameters, buffers and hooks."""
    return {name: copy.copy(value) if isinstance(value, dict | set) else value for name, value in attributes.items()}


def _leaves_base_unchanged(plan: Plan) -> bool:
    """Return whether a run in this process leaves the weights of its base model as they are."""
    lora = plan.workload.recipe.lora
    return lora is not None and get_world_size() == 1 and uses_only_own_tensors(build_lora_config(lora))


def _base_key(plan: Plan) -> str:
    """Return what the loaded base model depends on; another text for runs that change it."""
    recipe = plan.workload.recipe
    quantization = None if recipe.quantization is None else recipe.quantization.model_dump()
    return json.dumps(
        [
            recipe.model.model_dump(),
            plan.content["base"],
            quantization,
            plan.strategy.dequantized,
            str(select_device(recipe)),
            _leaves_base_unchanged(plan),
        ]
    )


def _step_key(plan: Plan) -> str:
    """Return what is constant in the CUDA graphs of a run: base, adapters, TF32 and the shapes of batches."""
    strategy, recipe = plan.strategy, plan.workload.recipe
    shapes = [strategy.layout.rows_per_device, strategy.bucket_lengths, strategy.tokens_per_replay]
    return json.dumps([_base_key(plan), recipe.lora, recipe.training.get("tf32"), strategy.cuda_graphs, shapes])
