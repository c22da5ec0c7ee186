"""Tokenizer, base model and adapters. The only place that calls `from_pretrained`."""

from __future__ import annotations

import copy
import hashlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MethodType
from typing import Any

import bitsandbytes as bnb
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import Linear4bit as PeftLinear4bit
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.autograd.function import once_differentiable
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from hw3.adapter_files import AdapterFiles, BadAdapter, read_adapter
from hw3.errors import UserError, first_line
from hw3.garbage import uncollected
from hw3.processes import local_rank
from hw3.recipe import Recipe, is_gemma2
from hw3.rows import file_sha256
from hw3.run_folder import weights_sha256
from hw3.schema import ModelSection, QuantizationSection

CPU_SETTINGS = (
    "training.use_cpu=true training.bf16=false model.dtype=float32 quantization.bnb_4bit_compute_dtype=float32"
)
NO_BF16_SETTINGS = "training.bf16=false model.dtype=float32 quantization.bnb_4bit_compute_dtype=float32"


def device_of(recipe: Recipe) -> torch.device:
    """Where this process runs: its own GPU, or the CPU where the recipe says so or there is no GPU."""
    if recipe.training.get("use_cpu") or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank())


def device_problems(recipe: Recipe, processes: int) -> list[str]:
    """What of the recipe this machine cannot do, each with the complete `SET=` that works here.

    Args:
        recipe: the recipe.
        processes: how many processes will run it on this machine.
    """
    problems = []
    training, on_cpu = recipe.training, bool(recipe.training.get("use_cpu"))
    uses_bf16 = training.get("bf16", True) is not False and not training.get("fp16")
    uses_bf16 |= recipe.model.dtype == "bfloat16"
    uses_bf16 |= recipe.quantization is not None and recipe.quantization.bnb_4bit_compute_dtype == "bfloat16"
    cpu, gpu = CPU_SETTINGS, NO_BF16_SETTINGS
    if recipe.quantization is None:
        cpu, gpu = (settings.rpartition(" ")[0] for settings in (cpu, gpu))
    if on_cpu:
        if training.get("bf16", True) is not False or training.get("fp16"):
            problems.append(f'training on a CPU is done in float32; this works: SET="{cpu}"')
    elif not torch.cuda.is_available():
        problems.append(f'this machine has no GPU that PyTorch can use; on the CPU (slow) this works: SET="{cpu}"')
    elif uses_bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        problems.append(f'{name} has no bfloat16; float32, slower but never out of range, works: SET="{gpu}"')
    elif processes > torch.cuda.device_count() and "LOCAL_WORLD_SIZE" not in os.environ:
        problems.append(f"{processes} processes, but {torch.cuda.device_count()} GPUs here; set GPUS to that or less")
    if recipe.model.device_map is not None and processes > 1:
        problems.append(
            "model.device_map: auto spreads one model over all GPUs, which clashes with one process a GPU; set "
            "model.device_map=null or run without a launcher (GPUS=1)"
        )
    return problems


def load_tokenizer(model: ModelSection) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with a padding token (EOS where it has none of its own).

    Raises:
        UserError: it cannot be had; says how to get it.
    """
    with uncollected():
        tokenizer = _from_pretrained(AutoTokenizer, model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of vocabulary, merges and special tokens."""
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.chat_template)
    text = tokenizer.backend_tokenizer.to_str() + repr(special)
    return hashlib.sha256(text.encode()).hexdigest()


def load_config(model: ModelSection) -> Any:
    """The base's configuration alone, no weights.

    Raises:
        UserError: it cannot be had; says how to get it.
    """
    return _from_pretrained(AutoConfig, model)


def quantization_config(quantization: QuantizationSection) -> BitsAndBytesConfig:
    """The one configuration that training, scoring and generation share."""
    return BitsAndBytesConfig(**quantization.model_dump())


def quantized_already(recipe: Recipe, config: Any) -> list[str]:
    """Where a base that was saved quantized differs from what the recipe says; its own way is the one that counts.

    Args:
        recipe: the recipe.
        config: the base's configuration.
    """
    found, name = getattr(config, "quantization_config", None), recipe.model.pretrained_model_name_or_path
    if found is None:
        return []
    found = found if isinstance(found, dict) else found.to_dict()
    if found.get("quant_method") != "bitsandbytes" or not found.get("load_in_4bit"):
        return [
            f"{name} is quantized by {found.get('quant_method')}; hw3 takes plain weights, or bitsandbytes' 4-bit ones"
        ]
    full = BitsAndBytesConfig.from_dict(found).to_dict()
    section = QuantizationSection(**{key: full[key] for key in QuantizationSection.model_fields})
    if recipe.quantization is None:
        return [f"quantization: {name} is saved in 4 bits; the recipe must say so: {section.model_dump()}"]
    return [
        f'quantization.{key}: found {value}; {name} is saved with {saved}; this works: SET="quantization.{key}={saved}"'
        for key, saved in section.model_dump().items()
        if (value := getattr(recipe.quantization, key)) != saved
    ]


def load_base(recipe: Recipe, device: torch.device) -> PreTrainedModel:
    """The recipe's base model in its compute dtype, quantized where the recipe says so, without adapters.

    Raises:
        UserError: it cannot be had; says how to get it.
    """
    quantization = None if recipe.quantization is None else quantization_config(recipe.quantization)
    if getattr(load_config(recipe.model), "quantization_config", None) is not None:
        quantization = None  # saved quantized, and `quantized_already` found the recipe's the same
    return load_model(recipe.model, quantization, device)


def attention_of(section: ModelSection) -> str | None:
    """The attention that the model is loaded with; None leaves it to transformers."""
    # Gemma-2 caps its attention scores, which sdpa cannot.
    return section.attn_implementation or ("eager" if is_gemma2(section) else None)


def load_model(section: ModelSection, quantization: BitsAndBytesConfig | None, device: torch.device) -> PreTrainedModel:
    """A causal language model on a device.

    Raises:
        UserError: it cannot be had; says how to get it.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, section.dtype)}
    if (attention := attention_of(section)) is not None:
        options["attn_implementation"] = attention
    if quantization is not None:
        options["quantization_config"] = quantization
    # Under ZeRO-3 DeepSpeed places the weights; 4-bit ones go to this process's device whole, and are spread later.
    if not is_deepspeed_zero3_enabled():
        options["device_map"] = section.device_map or {"": device}
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    return _for_training(_from_pretrained(AutoModelForCausalLM, section, **options))


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
    return _for_training(model)


class _Gathered(torch.autograd.Function):
    """A frozen 4-bit layer whose weight need not be there between forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: bnb.nn.Linear4bit) -> torch.Tensor:
        y = bnb.nn.Linear4bit.forward(layer, x)
        ctx.layer, ctx.dtype = layer, layer.compute_dtype or x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        weight, bias = ctx.layer.weight, ctx.layer.bias
        dx = db = None
        if ctx.needs_input_grad[0]:
            plain = bnb.functional.dequantize_4bit(weight.data.view(-1, 1), weight.quant_state)  # gathered again
            dx = (dy.to(ctx.dtype) @ plain.to(ctx.dtype)).to(dy.dtype)
        if ctx.needs_input_grad[1]:
            db = dy.flatten(0, -2).sum(0, dtype=bias.dtype)
        return dx, db, None


class GatheredLinear4bit(bnb.nn.Linear4bit):
    """A frozen 4-bit layer for ZeRO-3, which gathers weights for a forward or a backward and frees them after it.

    bitsandbytes' own keeps a view of what was gathered for its backward, activation checkpointing or not (0.50.2,
    MatMul4Bit), so that in the end a GPU holds every layer's whole weight beside its share.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As the layer it is made of."""
        return _Gathered.apply(x, self.bias, self)


def _for_training(model: PreTrainedModel) -> PreTrainedModel:
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            if is_deepspeed_zero3_enabled():
                module.__class__ = GatheredLinear4bit
            # A no-grad forward on AVX512-BF16 CPUs repacks the weights lossily, and later training steps then use a
            # kernel without gradients (bitsandbytes 0.50.2, nn/modules.py, Linear4bit.forward).
            module.support_avx512bf16_for_cpu = False
    return model


def scores_dequantized(recipe: Recipe, parameters: int, device: torch.device) -> bool:
    """Whether 4-bit layers become plain ones of the same weights, once, before scoring.

    It saves every forward the same work. By the device's whole memory, not by what happens to be free, and only where
    both ways compute in one dtype: PEFT adds the adapter's share in another order of rounding to a 4-bit layer, so the
    choice is part of an entry's key.

    Args:
        recipe: the recipe.
        parameters: of the base.
        device: where it will run.
    """
    if recipe.quantization is None or recipe.quantization.bnb_4bit_compute_dtype != recipe.model.dtype:
        return False
    return holds(device, parameters * getattr(torch, recipe.model.dtype).itemsize)


def holds(device: torch.device, weights: int) -> bool:
    """Whether a device has room for weights of this many bytes and for working with them; a CPU always."""
    if device.type == "cpu":
        return True
    return torch.cuda.get_device_properties(device).total_memory > 1.2 * weights + 2 * 2**30


def dequantize(model: PreTrainedModel) -> PreTrainedModel:
    """4-bit layers as plain ones, bit for bit the weights that each of their forwards makes."""
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # it would report the dtype as a warning
    try:
        return model.dequantize()
    finally:
        transformers.utils.logging.set_verbosity(verbosity)


def base_parameters(config: Any) -> int:
    """Parameters of the base, counted without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def parameter_counts(recipe: Recipe, config: Any) -> tuple[int, int]:
    """(trained, total) parameters of the recipe's model, counted without weights.

    Raises:
        UserError: `lora.target_modules` names no layer of the base.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = model.num_parameters()
    if recipe.lora is None:
        return total, total
    try:
        adapted = get_peft_model(model, lora_config(recipe.lora))
    except ValueError as error:
        raise UserError(f"lora: {first_line(error)}") from error
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad), total


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
        stamps = [_stamp(file) for file in files]
        digests = _digests(files)
        weights = {key: tensor for file in files for key, tensor in load_file(file).items()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        changed = [file for file, stamp in zip(files, stamps, strict=True) if _stamp(file) != stamp]
    except (RuntimeError, OSError, SafetensorError) as error:
        raise BadAdapter(f"{folder}: cannot be read: {first_line(error)}") from error
    if changed:
        raise BadAdapter(f"{changed[0]}: changed while it was read")
    tied = set(model.all_tied_weights_keys)
    if unexpected or set(missing) - tied:
        raise BadAdapter(f"{folder}: its weights are not those of {model.config.model_type}")
    model.tie_weights()
    return weights_sha256({file.name: digest for file, digest in digests.items()})


def _stamp(file: Path) -> tuple[int, ...]:
    """What is another once a file has been written to."""
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


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


def base_sha256(model: ModelSection, config: Any) -> str:
    """What the base is, by content: a hash of a local folder's weights and configuration, or the hub's commit.

    Args:
        model: the recipe's section.
        config: the loaded configuration, which knows the commit it came from.
    """
    folder = Path(model.pretrained_model_name_or_path)
    digest = hashlib.sha256()
    if folder.is_dir():
        for file, content in _digests(sorted([*folder.glob("*.safetensors"), folder / "config.json"])).items():
            digest.update(file.name.encode())
            digest.update(bytes.fromhex(content))
    else:
        commit = getattr(config, "_commit_hash", None) or model.revision or "main"
        digest.update(f"{model.pretrained_model_name_or_path}@{commit}".encode())
    return digest.hexdigest()


def _digests(files: list[Path]) -> dict[Path, str]:
    """Hex SHA-256 of files, several at once: hashing lets go of the interpreter's lock."""
    with ThreadPoolExecutor() as threads:
        return dict(zip(files, threads.map(file_sha256, files), strict=True))


def _from_pretrained(factory: Any, model: ModelSection, **options: Any) -> Any:
    name = model.pretrained_model_name_or_path
    try:
        return factory.from_pretrained(name, revision=model.revision, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        problem = _why_not_loaded(name, error)
        if problem is None:
            raise
        raise UserError(problem) from error


def _why_not_loaded(name: str, error: BaseException) -> str | None:
    """One message with the fix for a model that cannot be had; None for an error of another kind."""
    where = "model.pretrained_model_name_or_path"
    causes = list(_causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return (
            f"{where}: {name} is gated: accept its licence on https://huggingface.co/{name}, then run "
            "`hf auth login` (or set HF_TOKEN) and try again"
        )
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"model.revision: {name} has no such revision"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return f"{where}: {name} is neither a local folder nor a model on the hub; check its spelling"
    if isinstance(error, ImportError):
        return f"model.attn_implementation: {first_line(error)}"
    if isinstance(error, ValueError) and "model type" in str(error):
        return f"{where}: {name}: {first_line(error)}"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{where}: {name}: {error.strerror}: {error.filename}"
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        return f"{where}: the folder {name} is no model: it has no config.json"
    if isinstance(error, ValueError):
        return f"{where}: {name}: {first_line(error)}" if "tokenizer" in str(error) else None
    if Path(name).is_dir():
        return f"{where}: the folder {name} is not a complete model: {first_line(error)}"
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        return f"{where}: there is no folder {name}, and no model on the hub has such a name"
    return (
        f"{where}: there is no folder {name}, it is not in the local cache and the hub cannot be reached; connect "
        f"once, or download it elsewhere (`hf download {name}`) and give the folder's path"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
