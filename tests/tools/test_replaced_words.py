"""Counts of replaced words and identifiers."""

from pathlib import Path

from replaced_words import count_replaced_words


def test_count_replaced_words_reads_prose_and_identifiers(tmp_path: Path) -> None:
    (tmp_path / "hw3").mkdir()
    source = '"""Few worked\n    examples; fine-tuned."""\nROOM = 1  # rows a step\nkept = tuned = f"{ROOM} is kept"\n'
    (tmp_path / "hw3/a.py").write_text(source, encoding="utf-8")
    (tmp_path / "README.md").write_text("The un-tuned base, tuned\nalone.\n", encoding="utf-8")
    assert count_replaced_words(tmp_path, ("hw3",)) == {
        "worked examples?": 1,
        "un-?tuned": 1,
        "(?<!-)tuned": 1,
        "(rows?|bits?|nats|tokens?|seconds?|s|ms|GiB|lines?|words?) an? "
        "(step|character|token|row|GPU|process|checkpoint|second|batch|device|file)": 1,
        "kept": 1,
        "alone": 1,
        "ROOM (identifier)": 1,
    }
