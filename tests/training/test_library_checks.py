"""The second round of checks: values that only a library can judge are refused before anything is written."""

import os
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from hw3.cli import main
from hw3.config.recipe import load_recipe
from hw3.training.library_checks import find_library_problems

SCHEDULE = "lr_scheduler_type"


@pytest.mark.parametrize(
    ("overrides", "problems"),
    [
        (["training.adam_beta1=2"], ["training.adam_beta1: found 2, expected a number less than 1"]),
        (
            ["training.adam_epsilon=-1"],
            ["training.adam_epsilon: found -1, expected a number greater than or equal to 0"],
        ),
        (
            [f"training.{key}=.inf" for key in ("learning_rate", "logging_steps", "save_steps", "warmup_steps")],
            [
                f"training.{key}: found Infinity, expected a finite number"
                for key in ("learning_rate", "logging_steps", "save_steps", "warmup_steps")
            ],
        ),
        (
            ["training.dataloader_num_workers=9999"],
            ["training.dataloader_num_workers: found 9999, expected a number less than or equal to 64"],
        ),
        (["training.log_level=bogus"], ['training.log_level: found "bogus", expected one of detail, debug, info, ']),
        (["training.report_to=null"], ["training.report_to: found null, expected text or a list"]),
        (
            ['lora.rank_pattern={"(": 4}'],
            ['lora.rank_pattern: found {"(": 4}, expected a regular expression, but "(" is none: missing ), '],
        ),
        (
            ["lora.trainable_token_indices=[3, 64]"],
            ["lora.trainable_token_indices: found 64, expected token ids from 0 to 63"],
        ),
        (
            ["lora.trainable_token_indices={embed_tokens: [-1]}"],
            ["lora.trainable_token_indices: found -1, expected token ids from 0 to 63"],
        ),
        (["lora.r=1000000"], ["lora.r: found 1000000, expected a whole number from 1 to 64, the base model's hidden "]),
        (["lora.rank_pattern.q_proj=65"], ["lora.rank_pattern.q_proj: found 65, expected a whole number from 1 to 64"]),
        (
            ["training.optim=galore_adamw", f"training.{SCHEDULE}=warmup_stable_decay", "training.report_to=nothing"],
            [
                'training.report_to: found "nothing": nothing is not supported, only ',
                'training.optim: found "galore_adamw": You need to install `galore_torch`',
                f'training.{SCHEDULE}: found "warmup_stable_decay": get_wsd_schedule() missing 1 required positional ',
            ],
        ),
        (
            [f"training.{SCHEDULE}=cosine_with_min_lr", "training.lr_scheduler_kwargs={min: 3}"],
            ['training.lr_scheduler_kwargs: found {"min": 3}: get_cosine_with_min_lr_schedule_with_warmup() got an '],
        ),
        (
            [f"training.{SCHEDULE}=cosine", "training.warmup_steps=5", "training.lr_scheduler_kwargs={num_cycles: x}"],
            ['training.lr_scheduler_kwargs: found {"num_cycles": "x"}: could not convert string to float'],
        ),
        (
            ["training.ddp_timeout=0", "training.ddp_bucket_cap_mb=-1"],
            [
                "training.ddp_timeout: found 0, expected a number greater than or equal to 1",
                "training.ddp_bucket_cap_mb: found -1, expected a number greater than or equal to 1",
            ],
        ),
        (["training.optim_args=a"], ['training.optim_args: found "a": ']),
        (["training.dataloader_prefetch_factor=2"], ["training.dataloader_prefetch_factor: found 2: "]),
        (["training.debug=all"], ['training.debug: found "all": all is not a valid DebugOption']),
        (["lora.layers_pattern=h"], ["lora.target_modules: "]),
    ],
    ids=lambda value: value[0].partition("=")[0] if "=" in value[0] else "",
)
def test_value_that_a_library_refuses_is_reported_with_its_place_and_key(
    mini_recipe: Path,
    tmp_path: Path,
    overrides: list[str],
    problems: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", str(mini_recipe), "--run", str(tmp_path / "run"), *overrides]) == 2
    lines = capsys.readouterr().err.removeprefix("hw3: ").splitlines()
    for line, problem in zip(sorted(lines), sorted(problems), strict=True):
        place, _, message = line.partition(": ")
        assert place == "command line" or place.startswith(f"{mini_recipe}:")
        assert message.startswith(problem)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sharding", ["FSDP", "DEEPSPEED"])
def test_values_are_checked_under_a_sharded_launch_without_setting_it_up(
    mini_recipe: Path, sharding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        f"ACCELERATE_USE_{sharding}": "true",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
    }.items():
        monkeypatch.setenv(name, value)
    environment = dict(os.environ)
    overrides = ["training.optim=galore_adamw", f"training.{SCHEDULE}=warmup_stable_decay", "training.debug=all"]
    assert len(find_library_problems(load_recipe(mini_recipe, overrides[:2]))) == 2
    (problem,) = find_library_problems(load_recipe(mini_recipe, overrides[2:]))
    assert problem.startswith('command line: training.debug: found "all": all is not a valid DebugOption')
    assert dict(os.environ) == environment
    assert not torch.distributed.is_initialized() and not PartialState._shared_state


def test_precision_that_only_a_gpu_supports_does_not_hide_other_problems(mini_recipe: Path) -> None:
    overrides = ["training.use_cpu=false", "training.fp16=true", "training.bf16=false", "training.tf32=true"]
    assert find_library_problems(load_recipe(mini_recipe, overrides)) == []
    (problem,) = find_library_problems(load_recipe(mini_recipe, [*overrides, "training.optim=galore_adamw"]))
    assert problem.startswith('command line: training.optim: found "galore_adamw"')
