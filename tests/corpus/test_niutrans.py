"""Reading the corpus from clones, archives, downloads and parts."""

import io
import lzma
import tarfile
import zipfile
from pathlib import Path

import pytest
from sample_corpus import PAIRS, SMALL_SPLITS, clone_files, run_build

from hw3.common.hashing import file_sha256
from hw3.corpus.niutrans import read_corpus


def test_read_corpus_reads_a_clone_chapter_by_chapter(clone: Path) -> None:
    corpus = read_corpus(str(clone), None, clone)
    assert [(pair.classical, pair.modern) for pair in corpus.pairs] == PAIRS
    assert {pair.book for pair in corpus.pairs} == {"古事", "新书"}
    assert corpus.skipped_chapters == ["新书/坏: 2 lines in source.txt, 1 in target.txt"]
    assert read_corpus(str(clone / "双语数据"), None, clone).sha256 == corpus.sha256


@pytest.mark.parametrize("suffix", [".tar.gz", ".zip"])
def test_read_corpus_reads_the_same_pairs_from_an_archive_and_verifies_its_checksum(
    clone: Path, tmp_path: Path, suffix: str
) -> None:
    archive = tmp_path / f"Classical-Modern-0123abc{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for name, data in clone_files().items():
                file.writestr(f"Classical-Modern-0123abc/{name}", data)
    else:
        with tarfile.open(archive, "w:gz") as file:
            for name, data in clone_files().items():
                member = tarfile.TarInfo(f"Classical-Modern-0123abc/{name}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    sha256 = file_sha256(archive)
    assert read_corpus(str(archive), sha256, tmp_path).pairs == read_corpus(str(clone), None, tmp_path).pairs
    downloads = tmp_path / "downloads"
    downloaded = read_corpus(archive.as_uri(), sha256.upper(), downloads)
    assert (downloaded.sha256, len(downloaded.pairs)) == (sha256, 400)
    assert [path.name for path in downloads.iterdir()] == [archive.name]
    archive.unlink()  # a downloaded archive is not downloaded again
    assert len(read_corpus(archive.as_uri(), sha256, downloads).pairs) == 400


def test_build_refuses_an_archive_with_another_checksum_and_saves_nothing(
    clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name, data in clone_files().items():
            file.writestr(name, data)
    run_build(archive.as_uri(), tmp_path / "out", "--sha256", "0" * 64, expected_status=2)
    stderr = capsys.readouterr().err
    assert f"found sha256 {file_sha256(archive)}, expected {'0' * 64} (--sha256)" in stderr
    assert not any((tmp_path / "out").iterdir())
    report = run_build(archive.as_uri(), tmp_path / "out", *SMALL_SPLITS)
    assert f"sha256 {file_sha256(archive)}, not verified" in capsys.readouterr().err
    assert report["source"] == {
        "name": archive.as_uri(),
        "sha256": file_sha256(archive),
        "files": 7,
        "pairs": 400,
        "books": 2,
        "skipped_chapters": 1,
    }


@pytest.mark.parametrize(
    ("corpus", "arguments", "message"),
    [
        ("nowhere", [], "--corpus nowhere: neither a folder nor an archive"),
        (".", [], "no 双语数据/ and no *.tsv.xz in this folder"),
        (".", ["--sha256", "00"], "--sha256 is the checksum of an archive, but . is a folder"),
        ("file:///nowhere/a.zip", [], "--corpus file:///nowhere/a.zip: cannot be downloaded"),
        ("https://example.org/page", [], "not the URL of an archive"),
        ("truncated.tar.gz", [], "truncated.tar.gz: cannot be read"),
        ("empty", [], "bad.tsv.xz:2: found 2 fields, expected 3"),
    ],
)
def test_build_names_a_corpus_that_cannot_be_read_and_writes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    corpus: str,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "truncated.tar.gz").write_bytes(b"\x1f\x8b\x08 cut")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/bad.tsv.xz").write_bytes(lzma.compress(b"a\tb\tc\na\tb\n"))
    run_build(corpus, tmp_path / "out", *arguments, expected_status=2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
