"""`hw3 data build` on a made-up corpus: rows, report, processes, and the committed audit of a real build."""

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers import ENVIRONMENT, REPOSITORY, hw3
from sample_corpus import PAIRS, SMALL_SPLITS, run_build, write_row_file

from hw3.cli import main
from hw3.common.hashing import file_sha256
from hw3.corpus.filters import FILTER_RULES
from hw3.corpus.script_conversion import make_converter
from hw3.data.rows import read_rows
from hw3.data.templates import match_template


def test_make_data_is_one_hw3_call() -> None:
    command = [
        "make",
        "-n",
        "--no-print-directory",
        "VENV=",
        "data",
        "CORPUS=parts",
        "EXCLUDE=a.json b.json",
        "OUTPUT=there",
        "SHA256=00",
    ]
    completed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    printed = " ".join(completed.stdout.replace("\\\n", " ").split())
    assert printed == "hw3 data build --corpus parts --sha256 00 --exclude a.json b.json --output there"


def test_build_without_a_corpus_explains_how_to_get_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "build"]) == 2
    assert "git clone --depth 1 https://github.com/NiuTrans/Classical-Modern" in capsys.readouterr().err


def test_build_reports_its_stages_unless_quiet(clone: Path, tmp_path: Path) -> None:
    for name, options in ("shown", []), ("quiet", ["--quiet"]):
        output = tmp_path / name
        stdout, stderr = hw3("data", "build", "--corpus", clone, "--output", output, *SMALL_SPLITS, *options)
        assert stdout.endswith(f"{output}/data.json: source, counts, checksums\n")
        stages = [line.split()[0] for line in stderr.splitlines() if line[1:2] == "/"]
        assert stages == ([] if options else ["1/5", "2/5", "3/5", "4/5", "5/5"])
        assert "1 chapters skipped" in stderr  # a warning


def test_build_writes_rows_in_the_homeworks_format_and_is_reproducible(clone: Path, tmp_path: Path) -> None:
    report = run_build(clone, tmp_path / "a", *SMALL_SPLITS)
    run_build(clone, tmp_path / "b", *SMALL_SPLITS)
    names = ["data.json", "dev.json", "private_test.json", "public_test.json", "train.json"]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    other_report = run_build(clone, tmp_path / "c", *SMALL_SPLITS, "--seed", "1")
    assert other_report["splits"]["train"]["sha256"] != report["splits"]["train"]["sha256"]

    originals = set(make_converter("s2tw")([side for pair in PAIRS for side in pair]))
    occurrences: Counter[str] = Counter()
    for name, count in (("train", 60), ("dev", 10), ("public_test", 10), ("private_test", 10)):
        rows = read_rows(tmp_path / "a" / f"{name}.json", require_output=name != "private_test")
        assert len(rows) == count
        for row in rows:
            template, text = match_template(row.instruction)
            assert text in originals
            occurrences[text] += 1
            if row.output is not None:
                assert row.output.removeprefix(template.output_prefix) in originals
                occurrences[row.output.removeprefix(template.output_prefix)] += 1
            else:
                assert name == "private_test"
        record = json.loads((tmp_path / "a" / f"{name}.json").read_text(encoding="utf-8"))[0]
        assert list(record) == ["id", "instruction", "output"][: 2 if name == "private_test" else 3]
    assert set(occurrences.values()) == {1}
    train = report["splits"]["train"]
    # Every slot is drawn three times, three of them a fourth time: 10 slots are modern to Classical, 9 the reverse.
    assert train["m2c"] + train["c2m"] == 60 and 30 <= train["m2c"] <= 33
    assert report["splits"]["test"]["sha256"] == file_sha256(tmp_path / "a/public_test.json")
    assert report["clusters"] == {"pairs": 400, "clusters": 400, "pairs_with_near_duplicates": 0, "largest_cluster": 1}


def test_build_never_overwrites_files(clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dev.json").write_text("mine", encoding="utf-8")
    run_build(clone, tmp_path, *SMALL_SPLITS, expected_status=2)
    assert f"{tmp_path / 'dev.json'}: exists already and is never overwritten" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["dev.json"]
    assert (tmp_path / "dev.json").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("conversion", "template_text", "place"),
    [("none", "翻译成", "东门"), ("hanziconv", "將下麵句子", "東門"), ("s2tw", "將下面句子", "東門")],
)
def test_build_writes_instructions_in_the_script_of_the_text(
    clone: Path, tmp_path: Path, conversion: str, template_text: str, place: str
) -> None:
    run_build(clone, tmp_path / "out", "--convert", conversion, "--train", "300", *SMALL_SPLITS[2:])
    rows = read_rows(tmp_path / "out/train.json")
    instructions = "".join(row.instruction for row in rows)
    assert template_text in instructions and place in instructions
    assert all(match_template(row.instruction) for row in rows)


def test_build_with_several_processes_writes_the_same_bytes(
    clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    excluded = write_row_file(tmp_path / "theirs.json", [(f"{PAIRS[0][0]}\n翻譯成現代文：", PAIRS[0][1])])
    arguments = [*SMALL_SPLITS, "--exclude", str(excluded)]
    run_build(clone, tmp_path / "one", *arguments)
    monkeypatch.setattr("hw3.corpus.parallel.PAIRS_PER_CHUNK", 300)
    monkeypatch.setattr("hw3.corpus.splitting._CANDIDATES_PER_BATCH", 300)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    run_build(clone, tmp_path / "two", *arguments)
    for name in ("train.json", "public_test.json", "data.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_committed_audit_document_matches_its_json(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ahocorasick")
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    audit_data = __import__("audit_data")
    report = json.loads((REPOSITORY / "docs/data/audit.json").read_text(encoding="utf-8"))
    document = (REPOSITORY / "docs/data/audit.md").read_text(encoding="utf-8")
    assert document == audit_data.format_document(report)
    assert sum(file["copies"] for file in report["files"].values()) == 0
    assert {name: file["sha256"] for name, file in report["files"].items()} == {
        split["file"]: split["sha256"] for split in report["build"]["splits"].values()
    }
    assert [count["rule"] for count in report["build"]["cleaning"]] == list(FILTER_RULES)


# Builds, and is killed at the given call of `os.replace` or `os.rename`, which write and move its files.
KILLED_BUILD = """
import os, signal, sys
from hw3.cli import main

calls = 0

def killed_at_call(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

os.replace, os.rename = killed_at_call(os.replace), killed_at_call(os.rename)
main(sys.argv[2:])
"""


@pytest.mark.parametrize("call", [3, 6, 9, 11])  # five files are written, and then moved
def test_a_killed_build_can_be_run_again(clone: Path, tmp_path: Path, call: int) -> None:
    arguments = ["data", "build", "--corpus", str(clone), "--output", str(tmp_path / "out"), *SMALL_SPLITS]
    command = [sys.executable, "-c", KILLED_BUILD, str(call), *arguments]
    assert subprocess.run(command, env=ENVIRONMENT, capture_output=True).returncode == -signal.SIGKILL
    assert not (tmp_path / "out/data.json").exists()
    hw3(*arguments)
    run_build(clone, tmp_path / "expected", *SMALL_SPLITS)
    files = {path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()}
    assert len(files) == 5
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files
    assert main(arguments) == 2  # a complete build is never overwritten


def test_a_build_after_a_killed_one_keeps_files_that_are_not_its_own(clone: Path, tmp_path: Path) -> None:
    arguments = ["data", "build", "--corpus", str(clone), "--output", str(tmp_path / "out"), *SMALL_SPLITS]
    subprocess.run([sys.executable, "-c", KILLED_BUILD, "9", *arguments], env=ENVIRONMENT, capture_output=True)
    (moved, *_) = sorted((tmp_path / "out").glob("[!.]*.json"))
    moved.write_text("mine", encoding="utf-8")
    assert main(arguments) == 2
    assert moved.read_text(encoding="utf-8") == "mine"


def test_a_build_that_fails_leaves_nothing(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("hw3.corpus.build.write_json", fail)
    assert main(["data", "build", "--corpus", str(clone), "--output", str(tmp_path / "out"), *SMALL_SPLITS]) == 1
    assert not (tmp_path / "out").exists()
