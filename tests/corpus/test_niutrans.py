"""Reading the corpus from clones, archives, downloads and parts."""

import hashlib
import http.server
import io
import lzma
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sample_corpus import PAIRS, SMALL_SPLITS, clone_files, run_build

from hw3.common.errors import UserError
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
    assert not (tmp_path / "out").exists()
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


@pytest.fixture
def zip_bytes() -> bytes:
    """Return an archive of the corpus."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in clone_files().items():
            file.writestr(name, data)
    return buffer.getvalue()


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[bytes, int | None], str]]:
    """Serve a response body over HTTP, with a Content-Length that may be wrong; return the URL."""
    response: dict[str, Any] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            if response["length"] is None:
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"%x\r\n" % (len(response["body"]) + 1) + response["body"])
            else:
                self.send_header("Content-Length", str(response["length"]))
                self.end_headers()
                self.wfile.write(response["body"])

        def log_message(self, *arguments: Any) -> None:
            pass

    def set_response(body: bytes, length: int | None) -> str:
        response.update(body=body, length=length)
        return f"http://127.0.0.1:{server.server_port}/corpus.zip"

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield set_response
        server.shutdown()


def test_an_incomplete_download_is_not_kept(
    serve: Callable[[bytes, int | None], str], zip_bytes: bytes, tmp_path: Path
) -> None:
    half = zip_bytes[: len(zip_bytes) // 2]
    with pytest.raises(UserError, match=rf"cannot be downloaded: received {len(half):,} of {len(zip_bytes):,} bytes"):
        read_corpus(serve(half, len(zip_bytes)), None, tmp_path)
    with pytest.raises(UserError, match="cannot be downloaded: IncompleteRead"):
        read_corpus(serve(half, None), None, tmp_path)
    with pytest.raises(UserError, match="File is not a zip file; it was deleted, so run the same command"):
        read_corpus(serve(half, len(half)), None, tmp_path)
    assert not any(tmp_path.iterdir())
    assert len(read_corpus(serve(zip_bytes, len(zip_bytes)), None, tmp_path).pairs) == 400


def test_a_download_with_another_checksum_than_asked_for_is_replaced(
    serve: Callable[[bytes, int | None], str], zip_bytes: bytes, tmp_path: Path
) -> None:
    (tmp_path / "corpus.zip").write_bytes(b"old")
    url = serve(zip_bytes, len(zip_bytes))
    assert len(read_corpus(url, hashlib.sha256(zip_bytes).hexdigest(), tmp_path).pairs) == 400


def test_archives_that_are_encrypted_too_large_or_ambiguous_are_refused(
    zip_bytes: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "a.zip"
    encrypted = bytearray(zip_bytes)
    encrypted[6] |= 1  # the flag of the first member in its local header, and in the central directory
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(encrypted)
    with pytest.raises(UserError, match=r"a\.zip: cannot be read: File .* is encrypted.*; give an archive without"):
        read_corpus(str(archive), None, tmp_path)
    with zipfile.ZipFile(archive, "w") as file:
        for folder in "ab":
            file.writestr(f"{folder}/双语数据/书/source.txt", "甲")
    with pytest.raises(UserError, match=r"a\.zip: has 双语数据/书/source\.txt twice"):
        read_corpus(str(archive), None, tmp_path)
    monkeypatch.setattr("hw3.corpus.niutrans.MAX_CORPUS_BYTES", 2**20)
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("双语数据/书/source.txt", b" " * 2**24)
    with pytest.raises(UserError, match=r"a\.zip: its texts have over 1\.0 MiB; this is not the corpus"):
        read_corpus(str(archive), None, tmp_path)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/a.tsv.xz").write_bytes(lzma.compress(b" " * 2**24))
    with pytest.raises(UserError, match=r"a\.tsv\.xz: its texts have over 1\.0 MiB"):
        read_corpus(str(tmp_path / "parts"), None, tmp_path)


def test_a_truncated_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tsv.xz").write_bytes(lzma.compress(b"a\tb\tc\n" * 1000)[:-20])
    with pytest.raises(UserError, match=r"a\.tsv\.xz: cannot be read: Compressed file ended"):
        read_corpus(str(tmp_path), None, tmp_path)
