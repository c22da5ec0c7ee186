"""Swap adapters in a loaded base model, and merge one into it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import Linear4bit as PeftLinear4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from hw3.common.errors import first_line
from hw3.modeling.adapter_io import AdapterFiles, InvalidAdapterError, check_finite, read_adapter
from hw3.modeling.fingerprint import combine_weight_hashes, hash_files, stat_signature
from hw3.modeling.logits import verify_adapter_logits
from hw3.modeling.quantization import dequantize


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
    check_finite(folder, weights)
    if unexpected or set(missing) - set(model.all_tied_weights_keys):
        raise InvalidAdapterError(f"{folder}: its weights are not those of a {model.config.model_type} like the base")
    model.tie_weights()
    return combine_weight_hashes({file.name: sha256 for file, sha256 in sha256_by_file.items()})


# Settings with which a LoRA adapter still reads and writes nothing but its own tensors. All others, also those of later
# versions of PEFT, must have their defaults.
_OWN_TENSOR_SETTINGS = frozenset(
    {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
        *("use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
        *("use_dora", "lora_bias"),
    }
)


def uses_only_own_tensors(config: PeftConfig) -> bool:
    """Return whether an adapter's layers leave the base as it is: LoRA without settings that touch other tensors."""
    if type(config) is not LoraConfig or config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        return False
    defaults = LoraConfig()
    others = {field.name for field in fields(config)} - _OWN_TENSOR_SETTINGS
    return all(getattr(config, name) == getattr(defaults, name) for name in others)


@contextmanager
def _named_errors(folder: Path, problem: str) -> Iterator[None]:
    """Raise an `InvalidAdapterError` that names the folder in place of PEFT's errors, which are of any class."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise InvalidAdapterError(f"{folder}: {problem}: {first_line(error) or type(error).__name__}") from error


def _check_names(folder: Path, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raise an `InvalidAdapterError` if an adapter's file lacks tensors, or has some that belong nowhere."""
    if missing or unexpected:
        problem = f"misses {missing[0]}" if missing else f"has {unexpected[0]}"
        count = len(missing) + len(unexpected)
        raise InvalidAdapterError(f"{folder}: {count} weights do not fit the base; it {problem}")


def _forward_in_place(layer: PeftLinear | PeftLinear4bit, x: torch.Tensor) -> torch.Tensor:
    """Compute a PEFT LoRA layer without gradients.

    The float32 output of the adapter is added and rounded in one pass; PEFT needs three. This is the same for 4-bit
    layers, where PEFT rounds the adapter's output to 16 bits before it is added.
    """
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    assert isinstance(a, torch.nn.Linear), "the adapters of a linear layer are linear layers"
    return layer.base_layer(x).add_(b(a(x.to(a.weight.dtype))), alpha=layer.scaling["default"])


class AdapterSlot:
    """Hold one adapter, or the full weights of a checkpoint, in a base model. Each replaces the one before.

    The model then computes what a fresh load by PEFT computes, whatever was loaded before. An adapter that uses nothing
    but its own tensors is removed from the base again, or its values are replaced if the next one has the same
    configuration. Any other adapter may change the base's weights (PiSSA, biases, saved embeddings). It gets a fresh
    base, and so does what is loaded after it.

    Args:
        base: the loaded base model, without adapters.
        reload_base: load the base again, 4-bit weights as they are; None if the slot will hold one checkpoint only.
        dequantized: whether the 4-bit weights of `base` were dequantized.
        is_shared: whether `base` shares its weights with another model. What would change them gets a fresh base.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        reload_base: Callable[[], PreTrainedModel] | None = None,
        *,
        dequantized: bool = False,
        is_shared: bool = False,
    ) -> None:
        self._base = base
        self._is_base_shared = is_shared
        self._reload_base = reload_base
        self._dequantized = dequantized
        self._is_base_dequantized = dequantized
        self._is_base_changed = False  # weights or layers are not those of a fresh base
        self._holds_full_weights = False
        self._peft_model: PeftModel | None = None
        self._config: dict[str, Any] | None = None  # of the installed adapter, if it can be swapped
        self._own_tensors: dict[str, torch.Tensor] = {}  # of that adapter, by the name in its file

    @property
    def model(self) -> PreTrainedModel:
        """The base model with what was loaded last. A load may replace this object; do not keep it over a load."""
        return self._base

    def load(self, folder: Path) -> None:
        """Read the adapter of `folder`, install it in float32 and make it the active one.

        Raises:
            InvalidAdapterError: as `read_adapter` and `set`.
        """
        self.set(read_adapter(folder))

    def set(self, adapter: AdapterFiles) -> None:
        """Install an adapter in float32 and make it the active one.

        Raises:
            InvalidAdapterError: weights are missing or do not belong to the base, every B matrix is zero, or this kind
                of adapter cannot be scored.
        """
        adapter.config.inference_mode = True
        if not uses_only_own_tensors(adapter.config):
            self._load_into_fresh_base(adapter)
            return
        b_matrices = [tensor for name, tensor in adapter.weights.items() if "lora_B" in name]
        others = [name for name in adapter.weights if "lora_A" not in name and "lora_B" not in name]
        if b_matrices and not others and not any(tensor.any() for tensor in b_matrices):
            raise InvalidAdapterError(f"{adapter.folder}: every B matrix is zero, so the adapter has no effect")
        if adapter.config.to_dict() != self._config:
            self._install(adapter)
        if self._has_base_tensors(adapter):
            self._load_into_fresh_base(adapter)
            return
        with torch.no_grad():
            for name, tensor in self._own_tensors.items():
                tensor.copy_(adapter.weights[name], non_blocking=True)

    def load_full_weights(self, folder: Path) -> str:
        """Load a full fine-tuning checkpoint into the base; see the function `load_full_weights`."""
        if not self._holds_full_weights:  # others are overwritten completely
            self._take_base(dequantized=self._dequantized, will_change=True)
        self._is_base_changed = self._holds_full_weights = True
        return load_full_weights(self._base, folder)

    def _take_base(self, *, dequantized: bool, will_change: bool = False) -> PreTrainedModel:
        """Return the base without a trace of what was loaded before. Two bases are never in memory at once.

        Args:
            dequantized: return it with its 4-bit weights dequantized.
            will_change: whether its weights will be changed.
        """
        if self._peft_model is not None and not self._is_base_changed:
            self._base = self._peft_model.unload()
        self._peft_model, self._config, self._own_tensors = None, None, {}
        self._holds_full_weights = False
        is_needed_elsewhere = will_change and self._is_base_shared
        if self._is_base_changed or self._is_base_dequantized != dequantized or is_needed_elsewhere:
            assert self._reload_base is not None, "the slot was made for one checkpoint"
            del self._base
            gc.collect()  # PEFT's layers and hooks refer to each other
            torch.cuda.empty_cache()
            base = self._reload_base()
            self._base = dequantize(base) if dequantized else base
            self._is_base_dequantized, self._is_base_changed, self._is_base_shared = dequantized, False, False
        return self._base

    def _install(self, adapter: AdapterFiles) -> None:
        """Add the layers of an adapter that uses only its own tensors to the base, in place of those before."""
        base, config = self._take_base(dequantized=self._dequantized), adapter.config.to_dict()
        try:
            with _named_errors(adapter.folder, "it does not fit the base"):
                peft_model = PeftModel(base, adapter.config)
        except InvalidAdapterError:
            self._is_base_changed = any(isinstance(module, BaseTunerLayer) for module in base.modules())
            raise
        self._peft_model, self._config = peft_model.eval(), config
        self._own_tensors = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
        for layer in peft_model.modules():
            if isinstance(layer, PeftLinear | PeftLinear4bit) and not layer.lora_variant:
                layer.__dict__["forward"] = MethodType(_forward_in_place, layer)

    def _has_base_tensors(self, adapter: AdapterFiles) -> bool:
        """Return whether an adapter's file has tensors of the base beside those of the installed adapter.

        PEFT saves embeddings that an adapter has as a target, and loads them into the base.

        Raises:
            InvalidAdapterError: the file lacks tensors, or has tensors of other names or shapes.
        """
        assert self._peft_model is not None, "the adapter's layers are installed"
        own, weights = self._own_tensors, adapter.weights
        further = [name for name in weights if name not in own]
        unexpected = []
        if further:
            parameters = {name for name, _ in self._peft_model.named_parameters(remove_duplicate=False)}
            unexpected = [name for name in further if name not in parameters]
        _check_names(adapter.folder, [name for name in own if name not in weights], unexpected)
        for name, tensor in own.items():
            if weights[name].shape != tensor.shape:
                raise InvalidAdapterError(
                    f"{adapter.folder}: its weights do not fit the base: {name} has shape {list(weights[name].shape)}, "
                    f"expected {list(tensor.shape)}"
                )
        return bool(further)

    def _load_into_fresh_base(self, adapter: AdapterFiles) -> None:
        """Load an adapter that may change the base, as `PeftModel.from_pretrained` does.

        Raises:
            InvalidAdapterError: PEFT cannot load it, weights are missing, or this kind of adapter cannot be scored.
        """
        base = self._take_base(dequantized=False, will_change=True)
        self._is_base_changed = True
        with _named_errors(adapter.folder, "it does not fit the base"):
            peft_model = PeftModel(base, adapter.config)
        with _named_errors(adapter.folder, "its weights do not fit the base"):
            outcome: Any = set_peft_model_state_dict(peft_model, adapter.weights)
            expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
        missing = [name for name in expected if name not in adapter.weights]
        _check_names(adapter.folder, missing, outcome.unexpected_keys)
        self._peft_model = peft_model.eval()
        kind = getattr(adapter.config.peft_type, "value", None)
        with _named_errors(adapter.folder, f"this kind of adapter ({kind}) cannot be scored"):
            verify_adapter_logits(base, peft_model)

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
