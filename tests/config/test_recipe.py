"""Every recipe in the repository, every kind of mistake, overrides, and that each key reaches what it builds."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from helpers import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from transformers import BitsAndBytesConfig

from hw3.common.errors import UserError
from hw3.config.recipe import load_prompt, load_recipe
from hw3.config.schema import DECIDED_TRAINING_KEYS, LoraSection, TrainingSection
from hw3.modeling.adapter_slot import lora_config
from hw3.modeling.quantization import quantization_config
from hw3.training.batch_layout import step_layout
from hw3.training.sft_arguments import sft_config
from hw3.training.step_strategy import Speed

RECIPES = sorted(path for path in (REPOSITORY / "recipes").rglob("*.yaml") if path.parent.name != "prompts")
PROMPTS = sorted((REPOSITORY / "recipes/prompts").rglob("*.yaml"))
# Model, rows per device and accumulation, steps, LoRA rank, max_length.
STUDY = {
    "gemma": ("zake7749/gemma-2-2b-it-chinese-kyara-dpo", (4, 2), 3500, 64, 512),
    "llama": ("yentinglin/Llama-3-Taiwan-8B-Instruct", (1, 8), 2000, 16, 560),
}


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def problems_of(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as error:
        load_recipe(path, list(overrides))
    return [problem.replace(str(path), "F") for problem in error.value.problems]


def test_how_many() -> None:
    assert [path.relative_to(REPOSITORY).as_posix() for path in RECIPES] == [
        "recipes/gemma/qlora.yaml",
        "recipes/llama/qlora.yaml",
        "recipes/qwen/qlora.yaml",
        "recipes/tiny/qlora.yaml",
    ]
    assert [path.stem for path in PROMPTS] == ["bare", "chat_template", "course_default", "study"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_recipe_loads_builds_and_reads_back(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(copy).to_dict() == recipe.to_dict()
    on_cpu = load_recipe(path, ["training.use_cpu=true", "training.bf16=false"])
    training = on_cpu.training
    speed = Speed(step_layout(on_cpu, 1), False, False, training["activation_checkpointing"], training["optim"])
    config = sft_config(on_cpu, speed, tmp_path)
    for key, value in on_cpu.training.items():
        assert getattr(config, key) == value, key
    lora = lora_config(recipe.lora)
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (recipe.lora["r"], 16, "all-linear")
    nf4 = quantization_config(recipe.quantization)
    assert isinstance(nf4, BitsAndBytesConfig)
    assert (nf4.load_in_4bit, nf4.bnb_4bit_quant_type, nf4.bnb_4bit_use_double_quant) == (True, "nf4", True)


@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.stem)
def test_prompt_loads(path: Path) -> None:
    assert load_prompt(path).chat_template == (path.stem == "chat_template")


@pytest.mark.parametrize("name", STUDY)
def test_the_study(name: str) -> None:
    """Every figure of the study's table."""
    recipe = load_recipe(REPOSITORY / f"recipes/{name}/qlora.yaml")
    model, rows, steps, rank, max_length = STUDY[name]
    assert recipe.model.pretrained_model_name_or_path == model
    assert recipe.model.dtype == "bfloat16"
    assert recipe.quantization.bnb_4bit_compute_dtype == "bfloat16"
    assert (recipe.lora["r"], recipe.lora["lora_alpha"], recipe.lora["lora_dropout"]) == (rank, 16, 0.0)
    training = recipe.training
    assert (training["per_device_train_batch_size"], training["gradient_accumulation_steps"]) == rows
    assert (training["max_steps"], training["save_steps"]) == (steps, 100)
    assert (training["learning_rate"], training["lr_scheduler_type"]) == (1e-4, "constant")
    assert (training["optim"], training["max_grad_norm"], training["weight_decay"]) == ("paged_adamw_32bit", 0.3, 0.0)
    assert training["activation_checkpointing"] is True and training["bf16"] is True
    assert (recipe.data.max_length, recipe.data.too_long) == (max_length, "error")
    assert (recipe.data.train, recipe.data.eval) == ("data/homework/train.json", "data/homework/public_test.json")
    assert recipe.prompt.turn == "USER：{instruction}\nASSISTANT："
    assert recipe.prompt.system.startswith("你是一位語言轉換助理，") and recipe.prompt.system.endswith("簡潔的翻譯。")
    assert recipe.prompt.example_separator == "\n\n"
    assert [example.output[:4] for example in recipe.prompt.examples] == [
        "後未旬，",
        "初五，命",
        "第二天，",
        "渭州人鄭",
    ]


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


def test_all_problems_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(BAD, encoding="utf-8")
    found = problems_of(path, "training.learning_ratee=1", "foo", "lora.lora_alpha=x", "model.dtype=int8")
    expected = [
        "F:10: lora.r: given a second time",
        "command line: 'foo' is not of the form section.key=value",
        "F:23: speedd: no such section; did you mean speed?",
        'command line: model.dtype: found "int8": one of bfloat16, float16, float32 is needed',
        "F:4: model.dtyp: no such key; did you mean dtype?",
        'F:7: quantization.bnb_4bit_quant_type: found "nf5": did you mean nf4? one of nf4, fp4 is needed',
        "F:9: lora.r: found 2.5: a whole number is needed",
        'command line: lora.lora_alpha: found "x": a whole number is needed',
        'F:12: prompt.turn: found "abc": must hold {instruction} exactly once',
        'F:13: data.max_length: found "eight": a whole number is needed',
        "F:19: training.packing: decided by the project: one row is one sequence, padded; ",
        "F:20: training.eval_steps: decided by the project: checkpoints are scored apart from training, ",
        'F:16: training.per_device_train_batch_size: found "eight": a whole number is needed',
        "F:17: training.gradient_accumulation_steps: found 0: a number greater than or equal to 1 is needed",
        'F:18: training.lr_scheduler_type: found "constan": did you mean constant? one of linear, cosine, ',
        'F:21: training.bf16: found "yes": true or false is needed',
        "F:15: training.learning_rat: no such key; did you mean learning_rate?",
        "command line: training.learning_ratee: no such key; did you mean learning_rate?",
    ]
    assert len(found) == len(expected)
    # By place: the order within a section is pydantic's.
    for problem, start in zip(sorted(found), sorted(expected), strict=True):
        assert problem.startswith(start)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["model.attn_implementation=sdpa"], "Gemma-2 caps its attention scores"),
        (["lora=null"], "4-bit weights cannot be trained"),
        (["lora.target_modules=[q_proj, lm_head]"], "lora.target_modules: found lm_head"),
        (["lora.target_modules=.*"], "lora.target_modules: found lm_head"),
        (["lora.init_lora_weights=pissa"], "lora.init_lora_weights: found pissa: it changes the base's weights"),
        (["training.push_to_hub=true"], "training.push_to_hub"),
        (["lora.modules_to_save=[lm_head]"], "lora.modules_to_save: found lm_head"),
        (["training.fp16=true"], "bf16 and fp16 cannot both be true"),
        (["training.max_steps=-1"], "give max_steps or num_train_epochs"),
        (["training.max_steps=0"], "found 0: 1 or more is needed, or -1 for epochs"),
        (["training.save_strategy=best"], "one of steps, epoch is needed"),
        (["prompt=recipes/prompts/none.yaml"], "recipes/prompts/none.yaml: no such file"),
        (["model=null"], "model: the section is empty"),
        (["speed=fast"], "one of auto, plain, lean is needed"),
    ],
)
def test_combinations_that_cannot_work(overrides: list[str], problem: str) -> None:
    found = problems_of(REPOSITORY / "recipes/gemma/qlora.yaml", *overrides)
    assert len(found) == 1 and problem in found[0]


def test_values_as_yaml_1_2_reads_them(tmp_path: Path) -> None:
    text = (REPOSITORY / "recipes/tiny/qlora.yaml").read_text(encoding="utf-8")
    path = tmp_path / "tiny.yaml"
    path.write_text(text.replace("use_cpu: true", "run_name: no").replace("2e-3", "2E-3"), encoding="utf-8")
    recipe = load_recipe(path, ["training.seed=012", "training.weight_decay=1"])
    assert recipe.training["run_name"] == "no"
    assert recipe.training["learning_rate"] == 0.002 and recipe.training["seed"] == 12
    # Written down, `no` is quoted: other YAML readers would make it false.
    assert yaml.safe_load(recipe.to_yaml())["training"]["run_name"] == "no"


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)
NUMBERS = st.from_regex(r"[-+0-9eE._]{1,6}", fullmatch=True)


@given(name=NAMES | NUMBERS)
def test_any_text_reads_back(tmp_path_factory, name: str) -> None:
    recipe = load_recipe(REPOSITORY / "recipes/tiny/qlora.yaml")
    named = dataclasses.replace(recipe, training=recipe.training | {"run_name": name})
    path = tmp_path_factory.getbasetemp() / "named.yaml"
    path.write_text(named.to_yaml(), encoding="utf-8")
    assert load_recipe(path).training["run_name"] == name


def test_overrides() -> None:
    path = REPOSITORY / "recipes/tiny/qlora.yaml"
    recipe = load_recipe(path, ["quantization=null", "prompt=recipes/prompts/bare.yaml", "prompt.system=S", "lora.r=2"])
    assert recipe.quantization is None
    assert (recipe.prompt.system, recipe.prompt.turn) == ("S", "{instruction}\n")
    assert recipe.lora["r"] == 2 and recipe.name == "tiny-qlora"


@pytest.mark.parametrize("text", ["a: [1", "- 1", "a: !!python/object:os.system x", ""])
def test_no_yaml_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    assert len(problems_of(path)) == 1


@given(st.dictionaries(st.sampled_from(["model", "training", "data", "lora", "prompt", "speed"]), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6,
)))  # fmt: skip
def test_any_mapping_is_a_user_error_or_a_recipe(tmp_path_factory, values: dict) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    with pytest.raises(UserError):
        load_recipe(path)


def test_every_decided_key_is_a_key_of_the_library_and_refused() -> None:
    from dataclasses import fields

    from trl import SFTConfig

    names = {field.name for field in fields(SFTConfig)}
    assert set(DECIDED_TRAINING_KEYS) <= names
    assert not set(DECIDED_TRAINING_KEYS) & set(TrainingSection.model_fields)
    assert {"r", "lora_alpha", "use_rslora", "use_dora"} <= set(LoraSection.model_fields)
    path = REPOSITORY / "recipes/tiny/qlora.yaml"
    for key in sorted(DECIDED_TRAINING_KEYS):
        (problem,) = problems_of(path, f"training.{key}=1")
        assert problem.startswith(f"command line: training.{key}: decided by the project: ")


@pytest.mark.parametrize(
    ("rows", "accumulation", "processes", "expected"),
    [(4, 2, 1, (4, 2)), (4, 2, 2, (4, 1)), (4, 2, 4, (2, 1)), (4, 2, 8, (1, 1)), (1, 8, 4, (1, 2)), (4, 3, 6, (2, 1))],
)
def test_processes_take_over_accumulation_first(
    rows: int, accumulation: int, processes: int, expected: tuple[int, int]
) -> None:
    recipe = load_recipe(
        REPOSITORY / "recipes/tiny/qlora.yaml",
        [f"training.per_device_train_batch_size={rows}", f"training.gradient_accumulation_steps={accumulation}"],
    )
    layout = step_layout(recipe, processes)
    assert (layout.rows_per_device, layout.accumulation) == expected
    assert layout.processes * layout.rows_per_device * layout.accumulation == recipe.rows_per_step


def test_processes_that_do_not_divide() -> None:
    recipe = load_recipe(REPOSITORY / "recipes/gemma/qlora.yaml")
    with pytest.raises(UserError, match="do not divide among 3 processes; use 2 or 4 processes, or 6 or 9 rows a step"):
        step_layout(recipe, 3)
