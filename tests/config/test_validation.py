"""The message for every kind of mistake in a recipe."""

from pathlib import Path

import pytest
import yaml
from helpers import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

from hw3.common.errors import UserError
from hw3.config.recipe import load_recipe


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def load_problems(path: Path, *overrides: str) -> list[str]:
    """Return the problems of an invalid recipe, with `F` in place of its path."""
    with pytest.raises(UserError) as error:
        load_recipe(path, list(overrides))
    return [problem.replace(str(path), "F") for problem in error.value.problems]


BAD = """\
model:
  pretrained_model_name_or_path: some/gemma-2-2b
  attn_implementation: sdpa
  dtyp: float32
quantization:
  load_in_4bit: true
  bnb_4bit_quant_type: nf5
lora:
  r: 2.5
  r: 4
  target_modules: [q_proj, lm_head]
prompt: {turn: "abc"}
data: {train: a, eval: b, max_length: eight}
training:
  learning_rat: 1e-4
  per_device_train_batch_size: eight
  gradient_accumulation_steps: 0
  lr_scheduler_type: constan
  packing: true
  eval_steps: 4
  bf16: yes
  max_steps: 3
speedd: fast
"""


def test_all_problems_are_reported_together(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(BAD, encoding="utf-8")
    problems = load_problems(path, "training.learning_ratee=1", "foo", "lora.lora_alpha=x", "model.dtype=int8")
    expected = [
        "F:10: lora.r: repeated key",
        "command line: found 'foo', expected section.key=value",
        "F:23: speedd: no such section; did you mean speed?",
        'command line: model.dtype: found "int8", expected one of bfloat16, float16, float32',
        "F:4: model.dtyp: no such key; did you mean dtype?",
        'F:7: quantization.bnb_4bit_quant_type: found "nf5", expected one of nf4, fp4 (did you mean nf4?)',
        "F:9: lora.r: found 2.5, expected a whole number",
        'command line: lora.lora_alpha: found "x", expected a whole number',
        'F:12: prompt.turn: found "abc", expected {instruction} exactly once',
        'F:13: data.max_length: found "eight", expected a whole number',
        "F:19: training.packing: cannot be set in a recipe: each row is one padded sequence; ",
        "F:20: training.eval_steps: cannot be set in a recipe: checkpoints are scored after training, ",
        'F:16: training.per_device_train_batch_size: found "eight", expected a whole number',
        "F:17: training.gradient_accumulation_steps: found 0, expected a number greater than or equal to 1",
        'F:18: training.lr_scheduler_type: found "constan", expected one of linear, cosine, ',
        'F:21: training.bf16: found "yes", expected true or false',
        "F:15: training.learning_rat: no such key; did you mean learning_rate?",
        "command line: training.learning_ratee: no such key; did you mean learning_rate?",
    ]
    assert len(problems) == len(expected)
    # Sorted, because pydantic decides the order within a section.
    for problem, beginning in zip(sorted(problems), sorted(expected), strict=True):
        assert problem.startswith(beginning)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.attn_implementation=sdpa"], "cannot soft-cap attention scores as Gemma-2 does"),
        (["lora=null"], "4-bit weights cannot be trained"),
        (["lora.target_modules=[q_proj, lm_head]"], "lora.target_modules: found lm_head"),
        (["lora.target_modules=.*"], "lora.target_modules: found lm_head"),
        (
            ["lora.init_lora_weights=pissa"],
            "lora.init_lora_weights: found pissa, which changes the base model's weights",
        ),
        (["lora.alora_invocation_tokens=[5]"], "lora.alora_invocation_tokens: activated LoRA depends on the input"),
        (["training.push_to_hub=true"], "training.push_to_hub"),
        (["lora.modules_to_save=[lm_head]"], "lora.modules_to_save: found lm_head"),
        (["training.fp16=true"], "bf16 and fp16 cannot both be true"),
        (["training.max_steps=-1"], "set max_steps or num_train_epochs"),
        (["training.max_steps=0"], "found 0, expected 1 or more, or -1 to count epochs"),
        (["training.save_strategy=best"], "expected one of steps, epoch"),
        (["prompt=recipes/prompts/none.yaml"], "recipes/prompts/none.yaml: no such file"),
        (["model=null"], "model: the section is empty"),
        (["speed=fast"], "expected one of auto, plain, lean"),
        (
            ["data.dev=data/eval.json", "data.dev_fraction=0.1"],
            "data.dev_fraction: found 0.1, but data.dev names a file",
        ),
        (["data.dev_fraction=1.0"], "data.dev_fraction: found 1.0, expected a number less than 1"),
        (["evaluation.patience=5"], "evaluation.patience: found 5, but checkpoints are scored after training only"),
        (["evaluation.patience=0", "evaluation.during_training=true"], "expected a number greater than or equal to 1"),
        (["evaluation.best_by=bleu"], "expected one of mean_perplexity, token_perplexity"),
    ],
)
def test_conflicting_values_are_reported(overrides: list[str], message: str) -> None:
    problems = load_problems(REPOSITORY / "recipes/gemma/qlora.yaml", *overrides)
    assert len(problems) == 1 and message in problems[0]


@given(st.dictionaries(st.sampled_from(["model", "training", "data", "lora", "prompt", "speed"]), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6,
)))  # fmt: skip
def test_any_invalid_mapping_is_a_user_error(tmp_path_factory: pytest.TempPathFactory, values: dict) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    with pytest.raises(UserError):
        load_recipe(path)


@pytest.mark.parametrize(
    ("accumulation", "nearest"),
    [(2, "4 or 8 processes, or 7 or 14"), (10**12, "5 or 8 processes, or 3999999999996 or")],
)
def test_number_of_processes_is_judged_with_the_mistakes_of_other_sections(accumulation: int, nearest: str) -> None:
    overrides = ["lora.r=x", f"training.gradient_accumulation_steps={accumulation}"]
    with pytest.raises(UserError) as error:
        load_recipe(REPOSITORY / "recipes/gemma/qlora.yaml", overrides, processes=7)
    rank, rows = error.value.problems
    assert rank == 'command line: lora.r: found "x", expected a whole number'
    assert f"cannot be divided among 7 processes; use {nearest}" in rows
