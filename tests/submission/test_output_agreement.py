"""A submission folder may give other outputs than `hw3 predict` only in 16-bit precision, and only after a near tie."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest

from hw3.common.errors import RunError
from hw3.config.recipe import load_recipe
from hw3.data.rows import read_rows
from hw3.evaluation.selection import select_scored_checkpoint
from hw3.runs.run import Run
from hw3.submission.output_agreement import compare_outputs, generate_reference_outputs, open_generator


def test_compare_outputs_accepts_differences_only_after_near_ties(
    scored_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = select_scored_checkpoint(Run(scored_run))
    rows = read_rows(scored.data_file)
    reference = generate_reference_outputs(open_generator(scored), rows, scored.data_file)
    all_equal = "predictions: 10 of 10 equal to those of hw3 predict"
    assert compare_outputs(scored, rows, reference, reference.texts) == all_equal
    outputs = [*reference.texts[:-1], reference.texts[-1][:1] + "甲"]
    nine_equal = "9 of 10 equal to those of hw3 predict"
    with pytest.raises(RunError, match=f"{nine_equal}; the first that differs is row row-109"):
        compare_outputs(scored, rows, reference, outputs)

    run = shutil.copytree(scored_run, tmp_path / "run")
    bfloat16_recipe = load_recipe(run / "recipe.yaml", ["model.dtype=bfloat16"])
    (run / "recipe.yaml").write_text(bfloat16_recipe.to_yaml(), encoding="utf-8")
    scored = dataclasses.replace(scored, run=Run(run), recipe=bfloat16_recipe)
    one_differs = rf"{nine_equal}; 1 differ, first at tokens that are at most (\d+\.\d+) nats apart in bfloat16"
    with pytest.raises(RunError, match=f"{one_differs}, but at most 1 is rounding: row row-109") as error:
        compare_outputs(scored, rows, reference, outputs)
    gap = float(re.search(one_differs, str(error.value))[1])
    monkeypatch.setattr("hw3.submission.output_agreement.MAX_NEAR_TIE_NATS", gap + 0.01)
    assert re.match(f"predictions: {one_differs}$", compare_outputs(scored, rows, reference, outputs))
