"""Counts of every rule, and excluded sentences that are in no row."""

from pathlib import Path

from sample_corpus import PAIRS, SMALL_SPLITS, removed_by_rule, run_build, write_parts, write_row_file

from hw3.common.hashing import file_sha256
from hw3.corpus.script_conversion import make_converter


def test_build_counts_the_pairs_that_each_rule_removes(tmp_path: Path) -> None:
    rejected = [
        ("今日无□雨。", "今天没有下雨。"),
        ("今日无雨。", "今日，无雨。"),
        ("无。", "没有下雨。"),
        ("今日无雨。", "今天和明天都没有下雨，后天和大后天也没有。"),
        ("父胤之宋司空主簿也。", "自从两汉以来推举贤才都是这样。"),
        PAIRS[0],
        (PAIRS[1][0].replace("，", "、"), PAIRS[1][1]),
    ]
    report = run_build(write_parts(tmp_path / "corpus", [*PAIRS, *rejected]), tmp_path / "out", *SMALL_SPLITS)
    assert removed_by_rule(report) == {
        "odd characters": 1,
        "identical": 1,
        "length": 1,
        "length ratio": 1,
        "character overlap": 1,
        "duplicate": 2,
    }
    assert report["cleaning"][-1]["remaining"] == 400


def test_build_excludes_sentences_in_either_script_and_near_duplicates(tmp_path: Path) -> None:
    to_hanziconv = make_converter("hanziconv")
    converted = [tuple(to_hanziconv(pair)) for pair in PAIRS[:40]]
    rows = [(f"{classical}\n翻譯成現代文：", modern) for classical, modern in converted[:10]]
    rows += [(f"文言文翻譯：\n{classical}", f"答案：{modern}") for classical, modern in converted[10:20]]
    # Rows without an output count as well: with some characters changed, or with text around the sentence.
    changed = ["".join("唷" if at % 14 == 7 else c for at, c in enumerate(modern)) for _, modern in converted[20:30]]
    rows += [(f"翻譯成文言文：\n{text}", None) for text in changed]
    rows += [(f"請看：{classical}完", None) for classical, _ in converted[30:40]]
    excluded = write_row_file(tmp_path / "theirs.json", rows)
    corpus = write_parts(tmp_path / "corpus", PAIRS)
    arguments = ["--exclude", str(excluded), "--train", "all", *SMALL_SPLITS[2:]]
    report = run_build(corpus, tmp_path / "out", *arguments)
    assert removed_by_rule(report) == {"excluded: same": 20, "excluded: near": 10, "excluded: contained": 10}
    assert sum(split["rows"] for split in report["splits"].values()) == 360
    assert report["excluded_files"] == [
        {"name": "theirs.json", "sha256": file_sha256(excluded), "rows": 40, "sentences": 60}
    ]
    assert report["leakage_checks"]["rows_vs_excluded"]["copies"] == 0
    written = "".join((tmp_path / "out" / name).read_text(encoding="utf-8") for name in ("train.json", "dev.json"))
    for classical in make_converter("s2tw")([classical for classical, _ in PAIRS[:40]]):
        assert classical not in written
    # The report has counts and checksums only, so it does not reveal which pair an excluded row comes from.
    report_text = (tmp_path / "out/data.json").read_text(encoding="utf-8")
    assert not any(side in report_text for pair in [*PAIRS, *converted] for side in pair)
