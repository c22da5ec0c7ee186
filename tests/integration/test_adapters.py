"""Commands with adapters of any kind: their scores are those of PEFT alone, and what cannot be scored is named."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import compute_row_perplexity, hw3, save_adapter, write_recipe
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig, PeftModel, PromptTuningConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from hw3.config.recipe import load_recipe
from hw3.data.rows import Row, read_rows
from hw3.data.tokenization import Encoder
from hw3.generation.generator import RunGenerator
from hw3.modeling.loading import load_tokenizer
from hw3.runs.checkpoints import mark_complete
from hw3.runs.run import Run

LORA = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
CONFIGS: dict[str, PeftConfig] = {
    "plain": LoraConfig(**LORA),
    "pissa": LoraConfig(**LORA, init_lora_weights="pissa"),
    "olora": LoraConfig(**LORA, init_lora_weights="olora"),
    "bias": LoraConfig(**LORA, bias="lora_only"),
    "embed": LoraConfig(**LORA, modules_to_save=["embed_tokens"]),
    "tokens": LoraConfig(**LORA, trainable_token_indices=[5, 9]),
    "adalora": AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10),
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


def load_base(base: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, mini_base: Path) -> Path:
    """A folder with a float32 run of two checkpoints, and an adapter per configuration. Change only copies of it."""
    folder = tmp_path_factory.mktemp("adapters")
    hw3("train", write_recipe(folder, mini_base), "--run", folder / "run", "quantization=null", "training.max_steps=8")
    for name, config in CONFIGS.items():
        save_adapter(load_base(mini_base), folder / name, config)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained / "run", tmp_path / "run")


def read_scores(run: Path) -> dict[str | None, float]:
    entries = json.loads((run / "eval/eval/results.json").read_text(encoding="utf-8"))["entries"]
    return {Path(entry["checkpoint"] or "base").name: entry["mean_perplexity"] for entry in entries}


def score_with_peft(adapter: Path, run: Path, base: Path) -> float:
    recipe = load_recipe(run / "recipe.yaml")
    encoder = Encoder(load_tokenizer(recipe.model), recipe.prompt)
    model = PeftModel.from_pretrained(load_base(base), adapter).eval()
    perplexities = [compute_row_perplexity(model, encoder.encode(row)) for row in read_rows(Path(recipe.data.eval))]
    return sum(perplexities) / len(perplexities)


@pytest.mark.parametrize("first", ["pissa", "olora", "bias", "embed", "tokens"])
def test_eval_scores_an_adapter_as_before_after_one_that_changes_the_base(
    run: Path, trained: Path, mini_base: Path, first: str
) -> None:
    hw3("eval", run, "--adapter", trained / first, trained / "plain", trained / "plain")
    scores = read_scores(run)
    for name in (first, "plain"):
        assert scores[name] == pytest.approx(score_with_peft(trained / name, run, mini_base), rel=1e-5)


@pytest.mark.parametrize("names", [("embed", "plain"), ("ia3", "plain"), ("plain", "adalora", "ia3", "tokens")])
def test_eval_scores_different_kinds_without_the_runs_checkpoints(
    run: Path, trained: Path, mini_base: Path, names: tuple[str, ...]
) -> None:
    hw3("eval", run, "--base-only", "--adapter", *(trained / name for name in names))
    scores = read_scores(run)
    assert scores.keys() == {"base", *names}
    for name in names:
        assert scores[name] == pytest.approx(score_with_peft(trained / name, run, mini_base), rel=1e-5)


def test_eval_scores_the_other_adapters_if_one_kind_cannot_be_scored(run: Path, trained: Path) -> None:
    _, stderr = hw3("eval", run, "--base-only", "--adapter", trained / "prompt", trained / "plain", expected=1)
    assert stderr.count("this kind of adapter (PROMPT_TUNING) cannot be scored") == 1
    assert "not scored, as explained above: " in stderr
    assert read_scores(run).keys() == {"base", "plain"}
    # Nothing else is left to score, and the adapter is named again.
    assert "PROMPT_TUNING" in hw3("eval", run, "--base-only", "--adapter", trained / "prompt", expected=1)[1]


def test_adapter_with_nan_is_left_out_of_a_sweep_and_fails_if_named(run: Path, trained: Path, tmp_path: Path) -> None:
    folder = run / "checkpoint-4"
    weights = load_file(folder / "adapter_model.safetensors")
    name = min(weights)
    weights[name][0, 0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    mark_complete(folder, 4)
    shutil.copytree(folder, tmp_path / "theirs")
    message = f"{name} has NaN or infinite weights"
    _, stderr = hw3("eval", run)
    assert f"checkpoint-4: {message}" in stderr and read_scores(run).keys() == {"base", "checkpoint-8"}
    assert f"theirs: {message}" in hw3("eval", run, "--base-only", "--adapter", tmp_path / "theirs", expected=1)[1]
    for checkpoint in ("checkpoint-4", tmp_path / "theirs"):
        stderr = hw3("predict", run, "--text", "甲", "--checkpoint", checkpoint, expected=1)[1]
        assert message in stderr and "Traceback" not in stderr


def test_eval_goes_on_after_an_adapter_whose_log_likelihoods_overflow(run: Path, trained: Path, tmp_path: Path) -> None:
    huge = shutil.copytree(trained / "plain", tmp_path / "huge")
    file = huge / "adapter_model.safetensors"
    save_file({name: tensor * 1e25 for name, tensor in load_file(file).items()}, file)
    _, stderr = hw3("eval", run, "--base-only", "--adapter", huge, trained / "plain", expected=1)
    assert re.search(r"huge: row row-\d+: its log-likelihood is .*; skipped", stderr)
    assert read_scores(run).keys() == {"base", "plain"}


def test_eval_scores_entries_of_the_version_that_mixed_adapters_again(run: Path, trained: Path) -> None:
    hw3("eval", run, "--adapter", trained / "plain")
    file = run / "eval/eval/results.json"
    right = read_scores(run)
    results = json.loads(file.read_text(encoding="utf-8"))
    del results["settings"]["scoring_version"]
    for entry in results["entries"]:
        entry["mean_perplexity"] = 329.061
    file.write_text(json.dumps(results), encoding="utf-8")
    hw3("eval", run, "--adapter", trained / "plain")
    assert read_scores(run) == right


def test_eval_does_not_score_again_if_peft_wrote_its_sets_in_another_order(run: Path, trained: Path) -> None:
    hw3("eval", run, "--adapter", trained / "plain")
    before = (run / "eval/eval/results.json").read_bytes()
    copy = shutil.copytree(trained / "plain", run.parent / "copy")
    config = json.loads((copy / "adapter_config.json").read_text(encoding="utf-8"))
    config["target_modules"].reverse()
    (copy / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    hw3("eval", run, "--adapter", copy)
    assert (run / "eval/eval/results.json").read_bytes() == before


def test_full_weights_leave_no_trace_in_adapters(trained: Path, mini_base: Path, tmp_path: Path) -> None:
    run = tmp_path / "full"
    overrides = ["quantization=null", "lora=null", "training.max_steps=4"]
    hw3("train", write_recipe(tmp_path, mini_base), "--run", run, *overrides)
    hw3("eval", run, "--adapter", trained / "plain")
    assert read_scores(run)["plain"] == pytest.approx(score_with_peft(trained / "plain", run, mini_base), rel=1e-5)


@pytest.mark.parametrize("name", ["plain", "pissa", "embed", "tokens", "ia3"])
def test_predict_generates_as_peft_alone(run: Path, trained: Path, mini_base: Path, name: str) -> None:
    generator = RunGenerator.open(Run(run), str(trained / name), overrides=["generation.max_new_tokens=12"])
    encoded = generator.encoder.encode(Row("text", "甲乙丙。\n問", None))
    model = PeftModel.from_pretrained(load_base(mini_base), trained / name).eval()
    prompt = torch.tensor([encoded.prompt_ids])
    generated = model.generate(input_ids=prompt, max_new_tokens=12, do_sample=False, eos_token_id=1, pad_token_id=0)
    expected = generator.encoder.decode(generated[0, len(encoded.prompt_ids) :].tolist())
    assert generator.generate_text("甲乙丙。\n問") == expected
