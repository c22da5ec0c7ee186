"""Score entries: their JSON form, their names, and which one is the best."""

from pathlib import Path

import pytest
from helpers import make_score_entry

from hw3.data.fingerprint import DatasetFingerprint
from hw3.runs.results_file import (
    GroupScore,
    ResultsFile,
    RowContribution,
    ScoreEntry,
    ScoringSettings,
    finetuned_entries,
    select_best_entry,
)

ENTRY_JSON = """\
{
  "key": "checkpoint-10+0 own",
  "step": 10,
  "checkpoint": "checkpoint-10",
  "shots": 0,
  "prompt": {
    "name": "own",
    "sha256": "own"
  },
  "example_ids": [
    "甲"
  ],
  "adapter_sha256": "abc",
  "mean_perplexity": 6.0,
  "mean_perplexity_ci95": [
    5.0,
    7.0
  ],
  "token_perplexity": 5.5,
  "median_perplexity": 6.25,
  "bits_per_character": 2.5,
  "rows": 2,
  "tokens": 7,
  "unknown_tokens": 0,
  "by_direction": {
    "m2c": {
      "mean_perplexity": 0.1,
      "token_perplexity": 0.2,
      "rows": 2,
      "tokens": 7
    }
  },
  "by_length": {},
  "top_contributors": [
    {
      "id": "甲",
      "perplexity": 8.0,
      "share": 0.3333333333333333,
      "tokens": 6
    }
  ],
  "seconds": 0.125
}
"""


def test_score_entry_has_this_json_form() -> None:
    entry = make_score_entry(10, 6.0, adapter_sha256="abc").model_copy(
        update={
            "example_ids": ["甲"],
            "by_direction": {"m2c": GroupScore(mean_perplexity=0.1, token_perplexity=0.2, rows=2, tokens=7)},
            "top_contributors": [RowContribution(id="甲", perplexity=8.0, share=1 / 3, tokens=6)],
        }
    )
    assert entry.to_json() == ENTRY_JSON
    assert ScoreEntry.model_validate_json(ENTRY_JSON) == entry


def test_results_file_is_byte_equal_after_reading_and_writing(tmp_path: Path) -> None:
    results_file = ResultsFile(
        run="outputs/run",
        started=None,
        data=DatasetFingerprint(path="eval.json", sha256="eval hash", rows=2),
        settings=ScoringSettings(
            dtype="float32",
            attn_implementation=None,
            quantization={"load_in_4bit": True},
            dequantized=True,
            base_sha256="base hash",
            tokenizer_sha256="tokenizer hash",
            bootstrap_samples=100,
            bootstrap_seed=0,
        ),
        entries=[ScoreEntry.model_validate_json(ENTRY_JSON)],
        best=None,
    )
    results_file.write(tmp_path / "results.json")
    before = (tmp_path / "results.json").read_bytes()
    ResultsFile.read(tmp_path / "results.json").write(tmp_path / "results.json")
    assert (tmp_path / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("entry", "label", "is_base", "is_run_checkpoint"),
    [
        (make_score_entry(0), "base", True, False),
        (make_score_entry(0, shots=4), "base+4", True, False),
        (make_score_entry(100), "checkpoint-100", False, True),
        (make_score_entry(100, shots=1), "checkpoint-100+1", False, True),
        (make_score_entry(0, checkpoint="some/adapter"), "some/adapter", False, False),
        # An adapter outside the working directory, of which only the name is stored.
        (make_score_entry(0, checkpoint="checkpoint-100"), "checkpoint-100", False, False),
    ],
)
def test_score_entry_properties(entry: ScoreEntry, label: str, is_base: bool, is_run_checkpoint: bool) -> None:
    assert (entry.label, entry.is_base, entry.is_run_checkpoint) == (label, is_base, is_run_checkpoint)


def test_select_best_entry_takes_the_earliest_of_equals() -> None:
    entries = [
        make_score_entry(30, 5.0),
        make_score_entry(20, 4.0),
        make_score_entry(10, 4.0),
        make_score_entry(40, 4.0),
    ]
    assert select_best_entry(entries, "own") == entries[2]


def test_select_best_entry_considers_only_zero_shot_checkpoints_of_the_run_under_its_prompt() -> None:
    checkpoint = make_score_entry(10, 6.0)
    better = [
        make_score_entry(0, 1.0),
        make_score_entry(10, 1.0, shots=2),
        make_score_entry(10, 1.0, prompt="other"),
        make_score_entry(0, 1.0, checkpoint="some/adapter"),
        make_score_entry(0, 1.0, checkpoint="checkpoint-10"),
    ]
    assert select_best_entry([*better, checkpoint], "own") == checkpoint
    assert select_best_entry(better, "own") is None


def test_finetuned_entries_are_sorted_by_step() -> None:
    entries = [make_score_entry(100, 5.0), make_score_entry(0, 9.0), make_score_entry(20, 4.0)]
    assert [entry.step for entry in finetuned_entries(entries, "own")] == [20, 100]
