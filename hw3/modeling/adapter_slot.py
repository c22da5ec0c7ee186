"""Swap adapters in a loaded base model, and merge one into it."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import Linear4bit as PeftLinear4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from hw3.common.errors import first_line
from hw3.modeling.adapter_io import AdapterFiles, InvalidAdapterError, read_adapter
from hw3.modeling.fingerprint import combine_weight_hashes, hash_files, stat_signature


def build_lora_config(lora: dict[str, Any]) -> LoraConfig:
    """Return a recipe's `lora` section as PEFT's configuration."""
    return LoraConfig(**{"task_type": "CAUSAL_LM", **lora})


def load_full_weights(model: PreTrainedModel, folder: Path) -> str:
    """Load a full fine-tuning checkpoint's weights into the base model, tied weights included.

    The files are memory-mapped, so that memory needs to hold one model only.

    Args:
        model: the loaded base model.
        folder: the checkpoint.

    Returns:
        The hash of the loaded weights, as `Checkpoint.sha256`.

    Raises:
        InvalidAdapterError: the folder has no weights of this model, or they changed while they were read.
    """
    try:
        files = sorted(folder.glob("*.safetensors"))
        signatures = [stat_signature(file) for file in files]
        sha256_by_file = hash_files(files)
        weights = {key: tensor for file in files for key, tensor in load_file(file).items()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        pairs = zip(files, signatures, strict=True)
        changed = [file for file, signature in pairs if stat_signature(file) != signature]
    except (RuntimeError, OSError, SafetensorError) as error:
        raise InvalidAdapterError(f"{folder}: cannot be read: {first_line(error)}") from error
    if changed:
        raise InvalidAdapterError(f"{changed[0]}: changed while it was read")
    if unexpected or set(missing) - set(model.all_tied_weights_keys):
        raise InvalidAdapterError(f"{folder}: its weights are not those of a {model.config.model_type} like the base")
    model.tie_weights()
    return combine_weight_hashes({file.name: sha256 for file, sha256 in sha256_by_file.items()})


def _forward_in_place(layer: PeftLinear | PeftLinear4bit, x: torch.Tensor) -> torch.Tensor:
    """Compute a PEFT LoRA layer without gradients.

    The float32 output of the adapter is added and rounded in one pass; PEFT needs three. This is the same for 4-bit
    layers, where PEFT rounds the adapter's output to 16 bits before it is added.
    """
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    assert isinstance(a, torch.nn.Linear), "the adapters of a linear layer are linear layers"
    return layer.base_layer(x).add_(b(a(x.to(a.weight.dtype))), alpha=layer.scaling["default"])


class AdapterSlot:
    """Hold one adapter in a base model. Each adapter replaces the one before.

    The base is loaded once. A swapped adapter gives bitwise the same results as a fresh load.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._peft_model: PeftModel | None = None
        self._config: dict[str, Any] = {}  # of the adapter that is installed
        self._adapter_parameters: dict[str, torch.nn.Parameter] = {}  # by the name in an adapter's file

    def load(self, folder: Path) -> None:
        """Read the adapter of `folder`, install it in float32 and make it the active one.

        Raises:
            InvalidAdapterError: as `read_adapter` and `set`.
        """
        self.set(read_adapter(folder))

    def set(self, adapter: AdapterFiles) -> None:
        """Install an adapter in float32 and make it the active one.

        Raises:
            InvalidAdapterError: weights are missing or do not belong to the base, or every B matrix is zero.
        """
        folder, config, weights = adapter.folder, adapter.config, adapter.weights
        b_matrices = [tensor for name, tensor in weights.items() if "lora_B" in name]
        if b_matrices and not any(tensor.any() for tensor in b_matrices):
            raise InvalidAdapterError(f"{folder}: every B matrix is zero, so the adapter has no effect")
        config.inference_mode = True
        if config.to_dict() != self._config:
            self._install(config, folder)
        shapes = {name: parameter.shape for name, parameter in self._adapter_parameters.items()}
        if shapes == {name: weight.shape for name, weight in weights.items()}:
            with torch.no_grad():
                for name, parameter in self._adapter_parameters.items():
                    parameter.copy_(weights[name], non_blocking=True)
            return
        # PEFT stores some kinds of adapters under other names. It also reports what does not fit.
        try:
            outcome: Any = set_peft_model_state_dict(self._peft_model, weights)
        except RuntimeError as error:
            raise InvalidAdapterError(f"{folder}: its weights do not fit the base: {first_line(error)}") from error
        missing = [key for key in outcome.missing_keys if "default" in key]
        if missing or outcome.unexpected_keys:
            problem = f"misses {missing[0]}" if missing else f"has {outcome.unexpected_keys[0]}"
            count = len(missing) + len(outcome.unexpected_keys)
            raise InvalidAdapterError(f"{folder}: {count} weights do not fit the base; it {problem}")

    def _install(self, config: PeftConfig, folder: Path) -> None:
        """Add an adapter's layers to the base, in place of those of the adapter before."""
        self._config, self._adapter_parameters = {}, {}  # none, should this fail
        try:
            if self._peft_model is None:
                self._peft_model = PeftModel(self._base, config)
            else:
                for layer in self._peft_model.modules():
                    layer.__dict__.pop("forward", None)  # `_forward_in_place`, which may not suit the new adapter
                if "default" in self._peft_model.peft_config:
                    self._peft_model.delete_adapter("default")
                self._peft_model.add_adapter("default", config)
                self._peft_model.set_adapter("default")
        except ValueError as error:
            raise InvalidAdapterError(f"{folder}: it does not fit the base: {first_line(error)}") from error
        self._config = config.to_dict()
        self._peft_model.eval()
        self._adapter_parameters = {
            name.replace(".default.", "."): parameter
            for name, parameter in self._peft_model.named_parameters()
            if ".default." in name
        }
        for layer in self._peft_model.modules():
            if isinstance(layer, PeftLinear | PeftLinear4bit) and not layer.lora_variant and "default" in layer.lora_A:
                layer.__dict__["forward"] = MethodType(_forward_in_place, layer)

    def merge(self) -> PreTrainedModel:
        """Return the dequantized base with the adapter added to its weights. The slot cannot be used afterwards.

        Each sum is computed in float32 and rounded to the base's dtype once, one layer at a time to save memory. PEFT's
        safe merge, and its merge of DoRA, would round the adapter's weights to 16 bits first.
        """
        assert self._peft_model is not None, "no adapter loaded"
        dtype = self._base.dtype
        for layer in self._peft_model.modules():
            if isinstance(layer, BaseTunerLayer):
                base_layer = layer.get_base_layer()
                base_layer.float()
                layer.merge()
                base_layer.to(dtype)
        return self._peft_model.unload().to(dtype)
