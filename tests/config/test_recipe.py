"""Every recipe in the repository: it loads, reads back, and each of its keys reaches the object that it configures."""

import re
from pathlib import Path

import pytest
from helpers import REPOSITORY
from transformers import BitsAndBytesConfig

from hw3.common.errors import UserError
from hw3.config.recipe import list_prompt_files, load_prompt, load_recipe
from hw3.modeling.adapter_slot import build_lora_config
from hw3.modeling.quantization import build_quantization_config
from hw3.training.batch_layout import divide_batch
from hw3.training.sft_arguments import build_sft_config
from hw3.training.step_strategy import StepStrategy

RECIPE_FILES = sorted(
    path for path in (REPOSITORY / "recipes").rglob("*.yaml") if path.parent.name not in ("prompts", "search")
)
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
        "recipes/smollm2/study.yaml",
        "recipes/tiny/qlora.yaml",
        "recipes/tiny/study.yaml",
    ]
    assert [path.stem for path in PROMPT_FILES] == [
        "bare", "chat_en", "chat_template", "chat_zh_rules", "chat_zh_short", "course_default", "en_expert", "en_short",
        "study", "zh_expert", "zh_parallel", "zh_question", "zh_rules", "zh_short",
    ]  # fmt: skip


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
    alpha = 128 if path == REPOSITORY / "recipes/smollm2/qlora.yaml" else 16
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (recipe.lora["r"], alpha, "all-linear")
    nf4 = build_quantization_config(recipe.quantization)
    assert isinstance(nf4, BitsAndBytesConfig)
    assert (nf4.load_in_4bit, nf4.bnb_4bit_quant_type, nf4.bnb_4bit_use_double_quant) == (True, "nf4", True)


@pytest.mark.parametrize("path", PROMPT_FILES, ids=lambda path: path.stem)
def test_prompt_file_loads(path: Path) -> None:
    prompt = load_prompt(path)
    assert prompt.chat_template == path.stem.startswith("chat_")
    if path.stem != "bare":  # its newline is the one that ends the course's own instructions
        assert prompt.turn == prompt.turn.rstrip()
    if path.stem not in ("bare", "course_default"):
        assert not re.search(r"[\u4e00-\u9fff][,;:!?]", f"{prompt.system}{prompt.turn}")


def test_list_prompt_files_finds_names_all_and_paths() -> None:
    assert [list_prompt_files(name) for name in ("study", "my/own.yaml", "own.yml")] == [
        [Path("recipes/prompts/study.yaml")], [Path("my/own.yaml")], [Path("own.yml")],
    ]  # fmt: skip
    assert [REPOSITORY / path for path in list_prompt_files("all")] == PROMPT_FILES


@pytest.mark.parametrize(
    ("name", "end"),
    [("study1", "; did you mean study?"), ("al", "; did you mean all?"), ("zhshort", "; did you mean zh_short?")],
)
def test_list_prompt_files_suggests_the_nearest_name(name: str, end: str) -> None:
    with pytest.raises(UserError) as caught:
        list_prompt_files(name)
    assert str(caught.value) == f"--prompt {name}: no such prompt in recipes/prompts/{end}"


def test_list_prompt_files_names_the_folder_where_there_are_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^--prompt all: there is no folder recipes/prompts/ here; give the path of"):
        list_prompt_files("all")


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
