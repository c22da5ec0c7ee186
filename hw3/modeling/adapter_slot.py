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
from hw3.modeling.adapter_io import AdapterFiles, BadAdapter, read_adapter
from hw3.modeling.fingerprint import file_digests, stat_signature, weights_sha256


def lora_config(lora: dict[str, Any]) -> LoraConfig:
    """A recipe's `lora` section as PEFT's configuration."""
    return LoraConfig(**{"task_type": "CAUSAL_LM", **lora})


def load_weights(model: PreTrainedModel, folder: Path) -> str:
    """Put a full fine-tuning checkpoint's weights into the loaded base, tied ones included.

    They are mapped, not read into memory, which need not hold two models.

    Returns:
        What `Checkpoint.sha256` is of these weights.

    Raises:
        BadAdapter: the folder does not hold this model's weights, or they changed meanwhile.
    """
    try:
        files = sorted(folder.glob("*.safetensors"))
        stamps = [stat_signature(file) for file in files]
        digests = file_digests(files)
        weights = {key: tensor for file in files for key, tensor in load_file(file).items()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        changed = [file for file, stamp in zip(files, stamps, strict=True) if stat_signature(file) != stamp]
    except (RuntimeError, OSError, SafetensorError) as error:
        raise BadAdapter(f"{folder}: cannot be read: {first_line(error)}") from error
    if changed:
        raise BadAdapter(f"{changed[0]}: changed while it was read")
    tied = set(model.all_tied_weights_keys)
    if unexpected or set(missing) - tied:
        raise BadAdapter(f"{folder}: its weights are not those of {model.config.model_type}")
    model.tie_weights()
    return weights_sha256({file.name: digest for file, digest in digests.items()})


def _forward_in_place(layer: PeftLinear | PeftLinear4bit, x: torch.Tensor) -> torch.Tensor:
    """PEFT's forward of a LoRA layer, for no gradients: the float32 share is added and rounded in one pass, not three.

    The same for a 4-bit layer, where PEFT rounds the share to 16 bits before it adds it.
    """
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    return layer.base_layer(x).add_(b(a(x.to(a.weight.dtype))), alpha=layer.scaling["default"])


class AdapterSlot:
    """Room for one adapter in a base model: each load takes the place of the one before.

    The base is loaded once; swapping adapters gives bit for bit what a fresh load would.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._peft: PeftModel | None = None
        self._config: dict[str, Any] = {}
        self._places: dict[str, torch.nn.Parameter] = {}  # by the name in an adapter's file

    def load(self, folder: Path) -> None:
        """Put the adapter of `folder` into the base's layers, in float32, and make it the active one.

        Raises:
            BadAdapter: its files cannot be read, miss weights or hold others, or every B matrix is zero.
        """
        self.put(read_adapter(folder))

    def put(self, adapter: AdapterFiles) -> None:
        """The same with an adapter that has been read already.

        Raises:
            BadAdapter: it misses weights or holds others, or every B matrix is zero.
        """
        folder, config, weights = adapter.folder, adapter.config, adapter.weights
        b_matrices = [tensor for name, tensor in weights.items() if "lora_B" in name]
        if b_matrices and not any(tensor.any() for tensor in b_matrices):
            raise BadAdapter(f"{folder}: every B matrix is zero, the adapter does nothing")
        config.inference_mode = True
        if config.to_dict() != self._config:
            self._make_room(config, folder)
        # Of the same shape, weights are copied over those of the adapter before.
        if {name: place.shape for name, place in self._places.items()} == {n: w.shape for n, w in weights.items()}:
            with torch.no_grad():
                for name, place in self._places.items():
                    place.copy_(weights[name], non_blocking=True)
            return
        # Other kinds of adapters are stored under names that PEFT alone knows, and so is what does not fit.
        try:
            outcome = set_peft_model_state_dict(self._peft, weights)
        except RuntimeError as error:
            raise BadAdapter(f"{folder}: its weights do not fit the base: {first_line(error)}") from error
        missing = [key for key in outcome.missing_keys if "default" in key]
        if missing or outcome.unexpected_keys:
            problem = f"misses {missing[0]}" if missing else f"holds {outcome.unexpected_keys[0]}"
            count = len(missing) + len(outcome.unexpected_keys)
            raise BadAdapter(f"{folder}: {count} weights do not fit the base; it {problem}")

    def _make_room(self, config: PeftConfig, folder: Path) -> None:
        self._config, self._places = {}, {}  # until there is room
        try:
            if self._peft is None:
                self._peft = PeftModel(self._base, config)
            else:
                for layer in self._peft.modules():
                    layer.__dict__.pop("forward", None)  # ours, for the kind before
                if "default" in self._peft.peft_config:
                    self._peft.delete_adapter("default")
                self._peft.add_adapter("default", config)
                self._peft.set_adapter("default")
        except ValueError as error:
            raise BadAdapter(f"{folder}: it does not fit the base: {first_line(error)}") from error
        self._config = config.to_dict()
        self._peft.eval()
        parameters = self._peft.named_parameters()
        self._places = {
            name.replace(".default.", "."): parameter for name, parameter in parameters if ".default." in name
        }
        for layer in self._peft.modules():
            plain = isinstance(layer, PeftLinear | PeftLinear4bit) and not layer.lora_variant
            if plain and "default" in layer.lora_A:
                layer.forward = MethodType(_forward_in_place, layer)

    def merge(self) -> PreTrainedModel:
        """The base with the adapter's share added to its plain weights; the slot is used up.

        Each sum is made in float32 and rounded to the base's dtype once, one layer at a time to spare memory; PEFT's
        safe merge, and its merge of DoRA, would round the share to 16 bits first.
        """
        assert self._peft is not None, "no adapter loaded"
        dtype = self._base.dtype
        for layer in self._peft.modules():
            if isinstance(layer, BaseTunerLayer):
                plain = layer.get_base_layer()
                plain.float()
                layer.merge()
                plain.to(dtype)
        return self._peft.unload().to(dtype)
