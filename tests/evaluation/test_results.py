"""Results are written and loaded without loss, stale entries are dropped, and a dev file can select the best."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import make_score_entry

from hw3.common.errors import UserError
from hw3.evaluation.perplexity import RowScore, summarize
from hw3.evaluation.results import EvalResults
from hw3.runs.results_file import BestCheckpoint

MakeResults = Callable[..., EvalResults]
ROWS = [RowScore("a", 2.25, 1, 1), RowScore("b", 6.5, 3, 2)]


def load(results: EvalResults, **changes: object) -> EvalResults:
    """Load the files of `results` again, with some arguments changed."""
    arguments = {name: getattr(results, name) for name in ("run_name", "started", "data", "settings", "prompt_sha256")}
    return EvalResults.load(results.folder, **(arguments | changes))


@pytest.fixture
def written(make_results: MakeResults) -> EvalResults:
    """Results of the base model and of one checkpoint, written to files."""
    results = make_results("eval.json")
    results.add(make_score_entry(10, 6.0, adapter_sha256="abc"), ROWS)
    results.add(make_score_entry(0, 30.0), ROWS[::-1])
    return results


def test_load_returns_what_was_written(written: EvalResults) -> None:
    loaded = load(written)
    assert (
        loaded.entries
        == written.entries
        == [make_score_entry(0, 30.0), make_score_entry(10, 6.0, adapter_sha256="abc")]
    )
    assert loaded.row_scores == written.row_scores == {"base+0 own": ROWS[::-1], "checkpoint-10+0 own": ROWS}
    assert EvalResults.read(written.folder, "own", written.started).entries == written.entries


def test_write_leaves_files_with_the_same_content_alone(written: EvalResults) -> None:
    loaded = load(written)
    files = [written.folder / name for name in ("results.json", "rows.parquet")]
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    loaded.write()
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in files] == before
    assert written.changed and not loaded.changed


def test_load_drops_entries_of_other_rows_and_settings(written: EvalResults) -> None:
    assert load(written, data=written.data.model_copy(update={"sha256": "other"})).entries == []
    assert load(written, settings=written.settings.model_copy(update={"dtype": "bfloat16"})).entries == []


def test_load_drops_entries_of_other_rows_if_a_killed_process_has_written_only_the_rows(
    make_results: MakeResults, written: EvalResults
) -> None:
    """Rows are written first. The data file has fewer rows than when the results were written."""
    results_file = written.folder / "results.json"
    before = results_file.read_bytes()
    changed = make_results("eval.json")
    changed.data = written.data.model_copy(update={"sha256": "other"})
    changed.add(make_score_entry(0, 30.0), ROWS[:1])
    results_file.write_bytes(before)
    assert load(changed).entries == []


def test_load_drops_checkpoints_of_an_earlier_run(written: EvalResults) -> None:
    loaded = load(written, started="2026-02-02T00:00:00+00:00")
    assert [entry.label for entry in loaded.entries] == ["base"] == [key.split("+")[0] for key in loaded.row_scores]


@pytest.mark.parametrize("field", ["mean_perplexity", "token_perplexity", "median_perplexity", "bits_per_character"])
def test_drop_damaged_drops_entries_whose_figures_are_not_those_of_their_rows(
    make_results: MakeResults, caplog: pytest.LogCaptureFixture, field: str
) -> None:
    right = asdict(summarize(ROWS))
    base, checkpoint = (make_score_entry(step).model_copy(update=right) for step in (0, 10))
    results = make_results("eval.json")
    results.add(base, ROWS)
    results.add(checkpoint.model_copy(update={field: right[field] + 0.25}), ROWS)
    loaded = load(results)
    loaded.drop_damaged()
    assert loaded.entries == [base] and list(loaded.row_scores) == [base.key]
    file = results.folder / "results.json"
    assert caplog.messages == [f"{file}: the figures of checkpoint-10 are not those of its rows, so it is scored again"]
    loaded.add(checkpoint, ROWS)
    assert load(loaded).entries == [base, checkpoint]


def test_drop_stale_drops_only_checkpoints_that_were_trained_again(written: EvalResults) -> None:
    written.drop_stale({"checkpoint-10": "abc"})
    assert len(written.entries) == 2
    written.drop_stale({})  # a deleted checkpoint's scores stay
    assert len(written.entries) == 2
    written.drop_stale({"checkpoint-10": "def"})
    assert [entry.label for entry in written.entries] == ["base"]


def test_drop_stale_leaves_an_external_adapter_of_the_same_name(make_results: MakeResults) -> None:
    external = make_score_entry(0, 9.0, checkpoint="checkpoint-10", adapter_sha256="xyz")
    results = make_results("eval.json", external)
    results.row_scores[external.key] = ROWS
    results.drop_stale({"checkpoint-10": "abc"})
    assert results.entries == [external]


def test_best_checkpoint_is_selected_on_the_dev_file(make_results: MakeResults) -> None:
    results = make_results("eval.json", make_score_entry(10, 6.0), make_score_entry(20, 7.0))
    assert results.best_checkpoint() == BestCheckpoint(
        step=10, checkpoint="checkpoint-10", mean_perplexity=6.0, chosen_on="eval.json"
    )
    results.select_on(make_results("dev.json", make_score_entry(10, 15.0), make_score_entry(20, 10.0)))
    assert results.best_checkpoint() == BestCheckpoint(
        step=20, checkpoint="checkpoint-20", mean_perplexity=7.0, chosen_on="dev.json"
    )


def test_best_checkpoint_is_selected_by_token_perplexity(make_results: MakeResults) -> None:
    later = make_score_entry(20, 7.0).model_copy(update={"token_perplexity": 5.0})
    results = make_results("eval.json", make_score_entry(10, 6.0), later)
    results.best_by = "token_perplexity"
    assert results.best_checkpoint() == BestCheckpoint(
        step=20,
        checkpoint="checkpoint-20",
        mean_perplexity=7.0,
        chosen_on="eval.json",
        chosen_by="token_perplexity",
    )


def test_best_entry_is_none_while_the_selected_checkpoint_is_not_scored_here(make_results: MakeResults) -> None:
    results = make_results("eval.json", make_score_entry(10, 6.0))
    results.select_on(make_results("dev.json", make_score_entry(20, 10.0)))
    assert results.best_entry() is None and results.best_checkpoint() is None


def test_load_reports_files_that_cannot_be_read(written: EvalResults) -> None:
    (written.folder / "rows.parquet").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"cannot be read: .*; delete the folder to score again"):
        load(written)


def test_no_flipped_bit_of_the_column_names_changes_what_is_read(written: EvalResults) -> None:
    """Parquet's checksums do not cover the names: a column with another name was read as a column without values."""
    file = written.folder / "rows.parquet"
    content = file.read_bytes()
    places = [
        place + bit for name in (b"nll", b"tokens") for place in find_all(content, name) for bit in range(len(name))
    ]
    assert len(places) >= 18
    for place in places:
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            assert load(written).row_scores == written.row_scores
        except UserError as error:
            assert str(error).startswith(f"{file}: ") and "delete the folder to score again" in str(error)


def find_all(content: bytes, part: bytes) -> list[int]:
    return [place for place in range(len(content)) if content.startswith(part, place)]


ROW = {"entry": "base+0 own", "id": "a", "nll": 2.25, "tokens": 1, "characters": 1, "perplexity": 9.49}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"tokens": None}, "a value is missing"),
        ({"tokens": 0}, "row a has nll 2.25, 0 tokens, 1 characters"),
        ({"nll": float("nan")}, "row a has nll nan, 1 tokens, 1 characters"),
        ({"nll": 701.0}, "row a has nll 701.0, 1 tokens, 1 characters"),
        ({"characters": 0}, "row a has nll 2.25, 1 tokens, 0 characters"),
        ({"id": 7}, "columns are entry string, id int64, nll double, "),
        ({}, "has 1 rows of base, expected 2"),
    ],
)
def test_load_refuses_rows_whose_values_are_wrong(
    written: EvalResults, changes: dict[str, object], problem: str
) -> None:
    file = written.folder / "rows.parquet"
    schema = pq.read_schema(file)
    if "id" in changes:
        schema = schema.set(schema.get_field_index("id"), pa.field("id", pa.int64()))
    pq.write_table(pa.Table.from_pylist([ROW | changes], schema=schema), file)
    with pytest.raises(UserError) as caught:
        load(written)
    assert str(caught.value).startswith(f"{file}: ") and problem in str(caught.value)


def test_read_reports_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"results\.json: No such file or directory; score again: hw3 eval"):
        EvalResults.read(tmp_path, "own", None)


def test_add_keeps_entries_that_another_process_has_added(written: EvalResults) -> None:
    """Both results were loaded before either was written."""
    one, other = load(written), load(written)
    one.add(make_score_entry(20, 5.0, adapter_sha256="def"), ROWS)
    other.add(make_score_entry(30, 7.0, adapter_sha256="ghi"), ROWS)
    assert [entry.step for entry in load(written).entries] == [0, 10, 20, 30]
    assert [entry.step for entry in other.entries] == [0, 10, 20, 30]
    best = other.best_checkpoint()
    assert best is not None and best.step == 20


def test_add_does_not_keep_entries_that_were_dropped(written: EvalResults) -> None:
    written.drop_stale({"checkpoint-10": "another hash"})
    written.add(make_score_entry(20, 5.0, adapter_sha256="def"), ROWS)
    assert [entry.step for entry in load(written).entries] == [0, 20]


def test_two_writers_that_score_the_same_entries_keep_each_once(written: EvalResults) -> None:
    one, other = load(written), load(written)
    first, second = (make_score_entry(step, 5.0, adapter_sha256=str(step)) for step in (20, 30))
    one.add(first, ROWS)
    other.add(second, ROWS)
    other.add(first, ROWS)
    one.add(second, ROWS)
    loaded = load(written)
    assert [entry.step for entry in loaded.entries] == [0, 10, 20, 30]
    assert {len(scores) for scores in loaded.row_scores.values()} == {2}
