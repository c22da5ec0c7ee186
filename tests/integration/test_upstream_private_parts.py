"""What hw3 relies on inside other libraries: methods that it overrides, and private names that it uses.

The bounds of `pyproject.toml` allow patch releases, which may change these without notice. A failure here names what to
read again after an update.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import REPOSITORY

import hw3

CALLBACK = "self, args, state, control, **kwargs"

# By library: the dotted name, and its parameters; None where there are no parameters to check.
UPSTREAM: dict[str, dict[str, str | None]] = {
    "trl": {
        "trl.trainer.utils._use_triton": "device",
        "trl.SFTTrainer._metrics": None,
        "trl.SFTTrainer._total_train_tokens": None,
        "trl.SFTTrainer.training_step": "self, *args, **kwargs",
        "trl.SFTTrainer.log": "self, logs, start_time",
        "trl.SFTTrainer._save_checkpoint": "self, model, trial",
        "trl.SFTTrainer.create_model_card": "self, model_name, dataset_name, tags",
    },
    "transformers": {
        "transformers.Trainer._tr_loss": None,
        "transformers.Trainer._globalstep_last_logged": None,
        "transformers.Trainer.train": "self, resume_from_checkpoint, trial, ignore_keys_for_eval",
        "transformers.Trainer.training_step": "self, model, inputs, num_items_in_batch",
        "transformers.Trainer._clip_grad_norm": "self, model",
        "transformers.Trainer._track_num_input_tokens": "self, inputs",
        "transformers.Trainer.autocast_smart_context_manager": "self, cache_enabled",
        "transformers.Trainer.floating_point_ops": "self, inputs",
        "transformers.Trainer._get_train_sampler": "self, train_dataset",
        "transformers.Trainer._run_epoch": (
            "self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
            "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch"
        ),
        "transformers.Trainer._init_training_state": (
            "self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial"
        ),
        "transformers.Trainer._load_optimizer_and_scheduler": "self, checkpoint",
        "transformers.Trainer._save": "self, output_dir, state_dict",
        "transformers.Trainer._save_optimizer_and_scheduler": "self, output_dir",
        "transformers.TrainerCallback.on_train_begin": CALLBACK,
        "transformers.TrainerCallback.on_step_end": CALLBACK,
        "transformers.TrainerCallback.on_save": CALLBACK,
        "transformers.TrainerCallback.on_log": CALLBACK,
        "transformers.TrainerCallback.on_train_end": CALLBACK,
        "transformers.TrainingArguments._n_gpu": None,
        "transformers.PreTrainedConfig._attn_implementation": None,
        "transformers.cache_utils.DynamicLayer.update": "self, key_states, value_states, *args, **kwargs",
        "transformers.cache_utils.StaticLayer.get_seq_length": "self",
    },
    "accelerate": {
        "accelerate.state.AcceleratorState._reset_state": "reset_partial_state",
    },
    "bitsandbytes": {
        "bitsandbytes.backends.cpu.ops": None,
        "bitsandbytes.nn.Linear4bit.forward": "self, x",
    },
    "optuna": {
        "optuna.samplers.BaseSampler.before_trial": "self, study, trial",
        "optuna.samplers.BaseSampler.infer_relative_search_space": "self, study, trial",
        "optuna.samplers.BaseSampler.sample_relative": "self, study, trial, search_space",
        "optuna.samplers.BaseSampler.sample_independent": "self, study, trial, param_name, param_distribution",
        "optuna.storages.journal.JournalFileOpenLock.acquire": "self",
        "optuna.trial.Trial._suggest": "self, name, distribution",
        "optuna.trial.Trial._trial_id": None,
    },
    "evaluate": {
        "evaluate.Metric._info": "self",
        "evaluate.Metric._compute": "self, *, predictions, references, **kwargs",
    },
    "torch": {
        "torch.nn.Module.forward": "self, *input",
        "torch.nn.Module._forward_hooks": None,
        "torch.nn.Module._modules": None,
        "torch.nn.Module._parameters": None,
        "torch.autograd.Function.forward": "*args, **kwargs",
        "torch.autograd.Function.backward": "ctx, *grad_outputs",
        "torch.utils._pytree.tree_map_only": "type_or_types_or_pred, /, func, tree, is_leaf",
        "torch.utils._triton.has_triton": "",
        "torch._dynamo.reset": "",
        "torch._functorch.config.ban_recompute_materialized_backward": None,
        "torch._functorch.config.patch": None,
        "torch._inductor.config.cpp.vec_isa_ok": None,
        "torch._C._cuda_clearCublasWorkspaces": None,
        "torch._foreach_copy_": None,
    },
    # The first two are documented.
    "Python": {"os._exit": None, "urllib.parse.SplitResult._replace": None, "argparse._SubParsersAction": None},
}
NAMES = {name: parameters for library in UPSTREAM.values() for name, parameters in library.items()}


def resolve(name: str) -> Any:
    """Return the module or attribute with a dotted name; None for an attribute that only instances have."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        break
    for part in parts[count:]:
        if inspect.isclass(found) and not hasattr(found, part):
            assert is_set_on_instances(found, part), f"{name} is gone"
            return None
        found = getattr(found, part)
    return found


def is_set_on_instances(cls: type, attribute: str) -> bool:
    """Return whether a class or one of its bases annotates an attribute, or assigns it to `self`."""
    return any(
        attribute in inspect.get_annotations(base)
        or re.search(rf"self\.{attribute}\b[^=\n]*= ", inspect.getsource(base))
        for base in cls.__mro__
        if base is not object and base.__module__ != "abc"
    )


def format_parameters(function: Any) -> str:
    """Return the names of a function's parameters, with the stars of its signature."""
    bare = [
        parameter.replace(annotation=parameter.empty, default=parameter.empty)
        for parameter in inspect.signature(function).parameters.values()
    ]
    return str(inspect.Signature(bare))[1:-1]


def load_modules() -> Iterator[ModuleType]:
    for module in pkgutil.walk_packages(hw3.__path__, "hw3."):
        if module.name != "hw3.__main__":
            yield importlib.import_module(module.name)


def find_library_subclasses() -> dict[type, list[type]]:
    """Return the classes of hw3 that have bases from the libraries of `UPSTREAM`, each with these bases."""
    classes = {
        value
        for module in load_modules()
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__ == module.__name__
    }
    bases = {
        cls: [base for base in cls.__mro__ if base.__module__.partition(".")[0] in UPSTREAM]
        for cls in sorted(classes, key=lambda cls: cls.__qualname__)
    }
    return {cls: found for cls, found in bases.items() if found}


def class_body(cls: type) -> ast.ClassDef:
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    return body


def find_overrides() -> set[str]:
    """Return the methods of libraries that classes of hw3 override, by the base that defines them."""
    return {
        f"{base.__name__}.{node.name}"
        for cls, bases in find_library_subclasses().items()
        for node in class_body(cls).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("__")
        for base in [next((base for base in bases if node.name in vars(base)), None)]
        if base is not None
    }


def find_private_names() -> set[str]:
    """Return the private names of libraries that hw3 overrides or uses."""
    found = {name for override in find_overrides() if is_private(name := override.partition(".")[2])}
    for path in (REPOSITORY / "hw3").rglob("*.py"):
        found |= private_names_in(ast.parse(path.read_text(encoding="utf-8")))
    for cls, bases in find_library_subclasses().items():
        names = {
            node.attr for node in ast.walk(class_body(cls)) if isinstance(node, ast.Attribute) and is_self(node.value)
        }
        found |= {
            name
            for name in filter(is_private, names)
            if any(name in vars(base) or is_set_on_instances(base, name) for base in bases)
        }
    return found


def private_names_in(tree: ast.Module) -> set[str]:
    """Return the private names that a file imports, reads with `getattr`, or uses on other objects than `self`."""
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.ImportFrom):
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Attribute) and not is_self(node.value):
            is_super = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super"
            if is_super or node.attr not in defined:
                found.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return set(filter(is_private, found))


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def is_private(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"_[A-Za-z]\w*", name) is not None


@pytest.mark.parametrize("name", NAMES)
def test_upstream_name_has_the_expected_parameters(name: str) -> None:
    if name == "torch._C._cuda_clearCublasWorkspaces" and torch.version.cuda is None:
        pytest.skip("only builds of PyTorch with CUDA have it")
    found, expected = resolve(name), NAMES[name]
    if expected is not None:
        assert format_parameters(found) == expected


def test_upstream_lists_exactly_the_private_names_that_hw3_uses() -> None:
    listed = {part for name in NAMES for part in name.split(".") if is_private(part)}
    assert listed == find_private_names()


def test_upstream_lists_the_methods_that_hw3_overrides() -> None:
    listed = {name.split(".")[-1] for name in NAMES}
    missing = {name for name in find_overrides() if name.split(".")[-1] not in listed}
    assert not missing


def test_private_names_in_finds_every_kind_of_use() -> None:
    tree = ast.parse(
        "import torch._one\nfrom library import _two\nfrom _three import name\nlibrary._four = 1\n"
        "getattr(config, '_five', None)\nclass A(B):\n    def _own(self):\n        super()._own()\n"
        "        self._attribute\n        other._private()\n\n    def _private(self): ...\n"
    )
    assert private_names_in(tree) == {"_one", "_two", "_three", "_four", "_five", "_own"}
