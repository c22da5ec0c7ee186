"""Splits without leakage: clusters stay together, and the final verification replaces what the index missed."""

from pathlib import Path

import numpy as np
import pytest
from sample_corpus import PAIRS, SMALL_SPLITS, removed_by_rule, run_build, write_parts, write_row_file

from hw3.corpus.dedup import LeakageIndex, find_copies_exhaustively
from hw3.corpus.normalize import normalize_texts
from hw3.corpus.script_conversion import make_converter
from hw3.data.rows import read_rows
from hw3.data.templates import match_template


def test_build_keeps_near_duplicates_in_one_split(tmp_path: Path) -> None:
    """Every pair has a twin with one changed character and another translation."""
    twins = [(classical[:-3] + "兮" + classical[-2:], f"又一种译法：{modern}") for classical, modern in PAIRS]
    report = run_build(write_parts(tmp_path / "corpus", [*PAIRS, *twins]), tmp_path / "out", *SMALL_SPLITS)
    assert report["clusters"] == {
        "pairs": 800,
        "clusters": 400,
        "pairs_with_near_duplicates": 800,
        "largest_cluster": 2,
    }
    texts = {}
    for name in ("train", "dev", "public_test"):
        rows = read_rows(tmp_path / "out" / f"{name}.json")
        sides = [side for row in rows for side in (match_template(row.instruction)[1], row.output)]
        texts[name] = normalize_texts(sides)
    for a, b in (("train", "dev"), ("train", "public_test"), ("dev", "public_test")):
        assert find_copies_exhaustively(texts[a], texts[b]).copies == []
    assert report["leakage_checks"]["train_vs_evaluation"]["copies"] == 0


def test_build_replaces_copies_that_the_index_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    excluded = write_row_file(tmp_path / "theirs.json", [(f"{c}\n翻譯成現代文：", m) for c, m in PAIRS[:200]])
    monkeypatch.setattr(LeakageIndex, "find_copies", lambda self, texts, keys: np.zeros(len(texts), np.int8))
    arguments = ["--exclude", str(excluded), *SMALL_SPLITS]
    report = run_build(write_parts(tmp_path / "corpus", PAIRS), tmp_path / "out", *arguments)
    assert removed_by_rule(report) == {}
    assert report["leakage_checks"]["redrawn_pairs"] > 20
    assert report["leakage_checks"]["rows_vs_excluded"]["copies"] == 0
    texts = {match_template(row.instruction)[1] for row in read_rows(tmp_path / "out/train.json")}
    assert not texts & set(make_converter("s2tw")([side for pair in PAIRS[:200] for side in pair]))


def test_build_reports_too_few_pairs_and_writes_nothing(
    clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_build(clone, tmp_path / "out", expected_status=2)
    message = "400 distinct sentence pairs remain after cleaning, too few for 10,750 rows: the private split would"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
