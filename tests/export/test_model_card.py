"""The model card shows scores and data of the run, but no rows, local paths or settings of services."""

from pathlib import Path

from hw3.config.recipe import load_recipe
from hw3.data.rows import read_rows
from hw3.export.model_card import public_recipe
from hw3.runs.results_file import ResultsFile
from hw3.runs.run import Run


def test_model_card_shows_scores_and_data_but_no_rows(exported: Path, scored_run: Path) -> None:
    text = (exported / "README.md").read_text(encoding="utf-8")
    manifest = Run(scored_run).read_manifest()
    best = ResultsFile.read(scored_run / "eval/eval/results.json").best
    assert manifest.data["train"].sha256 in text and "| train | `train.json` | 44 |" in text
    assert f"| fine-tuned, step {best.step} | {best.mean_perplexity:.3f} [" in text and "| base model | " in text
    assert str(scored_run.parent) not in text
    for name in ("train.json", "eval.json"):
        for row in read_rows(scored_run.parent / name):
            assert row.instruction not in text and f"{row.output}\n" not in text


def test_public_recipe_leaves_out_few_shot_examples_and_settings_of_services(mini_recipe: Path) -> None:
    examples = "prompt.examples=[{instruction: 甲, output: 乙}]"
    public = public_recipe(load_recipe(mini_recipe, [examples, "training.run_name=mine"]))
    assert public["prompt"] == {
        "system": "天地玄黃",
        "turn": "問：{instruction}\n答：",
        "example_separator": "\n\n",
        "chat_template": False,
    }
    assert public["model"]["pretrained_model_name_or_path"] == "base" and public["data"]["max_length"] == 64
    assert "run_name" not in public["training"]
    assert public["training"]["learning_rate"] == 0.01
