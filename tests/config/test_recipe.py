"""Every recipe in the repository: it loads, reads back, and each of its keys reaches the object that it configures."""

from pathlib import Path

import pytest
from helpers import REPOSITORY
from transformers import BitsAndBytesConfig

from hw3.common.errors import UserError
from hw3.config.recipe import load_prompt, load_recipe
from hw3.modeling.adapter_slot import build_lora_config
from hw3.modeling.quantization import build_quantization_config
from hw3.training.batch_layout import divide_batch
from hw3.training.sft_arguments import build_sft_config
from hw3.training.step_strategy import StepStrategy

RECIPE_FILES = sorted(path for path in (REPOSITORY / "recipes").rglob("*.yaml") if path.parent.name != "prompts")
PROMPT_FILES = sorted((REPOSITORY / "recipes/prompts").rglob("*.yaml"))
# Model, (rows per device, gradient accumulation), steps, LoRA rank, max_length.
STUDY = {
    "gemma": ("zake7749/gemma-2-2b-it-chinese-kyara-dpo", (4, 2), 3500, 64, 512),
    "llama": ("yentinglin/Llama-3-Taiwan-8B-Instruct", (1, 8), 2000, 16, 560),
}


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def test_repository_has_these_recipes_and_prompts() -> None:
    assert [path.relative_to(REPOSITORY).as_posix() for path in RECIPE_FILES] == [
        "recipes/gemma/qlora.yaml",
        "recipes/llama/qlora.yaml",
        "recipes/qwen/qlora.yaml",
        "recipes/smollm2/qlora.yaml",
        "recipes/tiny/qlora.yaml",
    ]
    assert [path.stem for path in PROMPT_FILES] == ["bare", "chat_template", "course_default", "study"]


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: path.parent.name)
def test_recipe_loads_reads_back_and_configures_the_libraries(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(copy).to_dict() == recipe.to_dict()
    on_cpu = load_recipe(path, ["training.use_cpu=true", "training.bf16=false"])
    training = on_cpu.training
    speed = StepStrategy(divide_batch(on_cpu, 1), False, False, training["activation_checkpointing"], training["optim"])
    config = build_sft_config(on_cpu, speed, tmp_path)
    for key, value in on_cpu.training.items():
        assert getattr(config, key) == value, key
    lora = build_lora_config(recipe.lora)
    alpha = 128 if path.parent.name == "smollm2" else 16
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (recipe.lora["r"], alpha, "all-linear")
    nf4 = build_quantization_config(recipe.quantization)
    assert isinstance(nf4, BitsAndBytesConfig)
    assert (nf4.load_in_4bit, nf4.bnb_4bit_quant_type, nf4.bnb_4bit_use_double_quant) == (True, "nf4", True)


@pytest.mark.parametrize("path", PROMPT_FILES, ids=lambda path: path.stem)
def test_prompt_file_loads(path: Path) -> None:
    assert load_prompt(path).chat_template == (path.stem == "chat_template")


@pytest.mark.parametrize("name", STUDY)
def test_recipe_has_the_settings_of_the_study(name: str) -> None:
    """All numbers are from the study's table."""
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


def test_overrides_are_applied_in_order() -> None:
    path = REPOSITORY / "recipes/tiny/qlora.yaml"
    recipe = load_recipe(path, ["quantization=null", "prompt=recipes/prompts/bare.yaml", "prompt.system=S", "lora.r=2"])
    assert recipe.quantization is None
    assert (recipe.prompt.system, recipe.prompt.turn) == ("S", "{instruction}\n")
    assert recipe.lora["r"] == 2 and recipe.name == "tiny-qlora"


def test_tiny_recipe_accepts_the_longest_row_of_the_homework() -> None:
    assert load_recipe(REPOSITORY / "recipes/tiny/qlora.yaml").data.max_length >= 585  # tokens


def test_prompt_file_is_found_from_the_recipe_when_it_is_read_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = REPOSITORY / "recipes/tiny/qlora.yaml"
    assert load_recipe(path).prompt.turn == "USER：{instruction}\nASSISTANT："
    assert load_recipe(path, ["prompt=recipes/prompts/bare.yaml"]).prompt.turn == "{instruction}\n"
    # A file in the working directory comes first.
    (tmp_path / "recipes/prompts").mkdir(parents=True)
    (tmp_path / "recipes/prompts/study.yaml").write_text('turn: "{instruction}X"\n', encoding="utf-8")
    assert load_recipe(path).prompt.turn == "{instruction}X"
    with pytest.raises(UserError, match=r"prompt: none\.yaml: no such file"):
        load_recipe(path, ["prompt=none.yaml"])
