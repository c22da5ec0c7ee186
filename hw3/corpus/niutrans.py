"""Read the sentence pairs of NiuTrans/Classical-Modern from a clone, an archive, a download or a folder of parts.

A clone has `双语数据/<book>/<chapter...>/bitext.txt` with blocks of `古文：...` and `现代文：...`. The same sentences
are line by line in `source.txt` and `target.txt`.

Parts are `*.tsv.xz` files with lines `book<TAB>classical<TAB>modern`. All texts are in simplified characters, as
published.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import lzma
import shutil
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from tqdm import tqdm

from hw3.common.disk import format_bytes
from hw3.common.errors import UserError, truncate_problems
from hw3.common.hashing import file_sha256
from hw3.common.progress import can_show_live_progress
from hw3.common.text import escape_invisible
from hw3.common.text_files import check_regular_file

CORPUS_FOLDER = "双语数据"
_CHAPTER_FILES = ("bitext.txt", "source.txt", "target.txt")
_CLASSICAL_LABEL, _MODERN_LABEL = "古文：", "现代文："
_ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
_DOWNLOAD_TIMEOUT_SECONDS = 60
_READ_CHUNK_BYTES = 2**20
MAX_CORPUS_BYTES = 4 * 2**30  # uncompressed; the corpus has under 1 GiB
CORPUS_HELP = (
    "give the corpus: --corpus PATH (make data CORPUS=PATH), one of",
    "  a clone: git clone --depth 1 https://github.com/NiuTrans/Classical-Modern",
    "  an archive of it, a file or a URL: https://github.com/NiuTrans/Classical-Modern/archive/COMMIT.tar.gz, "
    "verified with --sha256",
    "  a folder of *.tsv.xz parts: book, classical, modern",
)

logger = logging.getLogger(__name__)


class UnreadableArchiveError(UserError):
    """An archive is damaged or incomplete."""


class SentencePair(NamedTuple):
    """A Classical sentence and its modern translation, as published."""

    book: str
    classical: str
    modern: str


@dataclass(frozen=True)
class Corpus:
    """The pairs of a corpus.

    Attributes:
        pairs: in the order of the files' names.
        sha256: of the archive if the corpus is one, else of the bytes of all files read, one after another.
        files: the number of files read.
        skipped_chapters: chapters (`book/chapter`) that could not be read as pairs, each with the reason.
    """

    pairs: list[SentencePair]
    sha256: str
    files: int
    skipped_chapters: list[str] = field(default_factory=list)


def read_corpus(source: str, sha256: str | None, download_folder: Path) -> Corpus:
    """Read the pairs of a folder, an archive or a URL.

    Args:
        source: a clone, a folder of parts, the path of an archive, or the `http(s)://` or `file://` URL of an archive.
        sha256: the expected checksum of an archive, in hex; None skips the check.
        download_folder: where a downloaded archive is saved. An archive that is already there is not downloaded again.

    Raises:
        UserError: the source does not exist, has another checksum, or has no pairs.
    """
    if "://" in source:
        archive = download_archive(source, download_folder, sha256)
        try:
            return _read_archive(archive, sha256)
        except UnreadableArchiveError as error:
            archive.unlink()
            raise UserError(f"{error}; it was deleted, so run the same command to download it again") from None
    path = Path(source)
    if path.is_file() and path.name.endswith(_ARCHIVE_SUFFIXES):
        return _read_archive(path, sha256)
    if not path.is_dir():
        raise UserError(
            f"--corpus {source}: neither a folder nor an archive ({', '.join(_ARCHIVE_SUFFIXES)})", *CORPUS_HELP[1:]
        )
    if sha256 is not None:
        raise UserError(f"--sha256 is the checksum of an archive, but {source} is a folder; leave --sha256 out")
    if sorted(path.glob("*.tsv.xz")):
        return read_parts(path)
    root = path if path.name == CORPUS_FOLDER else path / CORPUS_FOLDER
    if not root.is_dir():
        raise UserError(f"{source}: no {CORPUS_FOLDER}/ and no *.tsv.xz in this folder", *CORPUS_HELP[1:])
    files = {
        PurePosixPath(file.relative_to(root).as_posix()): file.read_bytes()
        for file in root.rglob("*.txt")
        if file.name in _CHAPTER_FILES and file.is_file()
    }
    return _parse_chapters(files, source)


def read_parts(folder: Path) -> Corpus:
    """Read every `*.tsv.xz` of a folder.

    Raises:
        UserError: there is no such file, or lines do not have three fields; each such line is named.
    """
    files = sorted(folder.glob("*.tsv.xz"))
    if not files:
        raise UserError(f"{folder}: no *.tsv.xz file in this folder")
    digest = hashlib.sha256()
    pairs: list[SentencePair] = []
    problems: list[str] = []
    for file in files:
        check_regular_file(file)
        digest.update(file.read_bytes())
        try:
            with lzma.open(file) as stream:
                data = _read_at_most(stream, MAX_CORPUS_BYTES, file)
            text = data.decode("utf-8-sig")
        except (lzma.LZMAError, EOFError, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read: {error}") from None
        for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
            fields = line.split("\t")
            if len(fields) == 3:
                pairs.append(SentencePair(*fields))
            else:
                problems.append(f"{file}:{number}: found {len(fields)} fields, expected 3 separated by tabs")
    if problems:
        raise UserError(*truncate_problems(problems))
    return Corpus(pairs, digest.hexdigest(), len(files))


def download_archive(url: str, folder: Path, sha256: str | None) -> Path:
    """Download an archive to `folder` with a progress bar. Its file appears only complete and with the right checksum.

    An archive that is there already, with this checksum, is not downloaded again.

    Raises:
        UserError: the archive cannot be downloaded or has another checksum.
    """
    target = folder / PurePosixPath(url.partition("?")[0]).name
    if not target.name.endswith(_ARCHIVE_SUFFIXES):
        raise UserError(f"--corpus {url}: not the URL of an archive ({', '.join(_ARCHIVE_SUFFIXES)})")
    if target.is_file() and (sha256 is None or file_sha256(target) == sha256.lower()):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.part")
    try:
        with urllib.request.urlopen(url, timeout=_DOWNLOAD_TIMEOUT_SECONDS) as response, partial.open("wb") as file:
            size = int(response.headers.get("Content-Length") or 0) or None
            with tqdm.wrapattr(
                response, "read", total=size, desc=escape_invisible(target.name), disable=not can_show_live_progress()
            ) as stream:
                shutil.copyfileobj(stream, file, _READ_CHUNK_BYTES)
        # A connection that is lost looks like the end of the response.
        if size is not None and partial.stat().st_size != size:
            raise OSError(f"received {partial.stat().st_size:,} of {size:,} bytes; run the same command again")
        if sha256 is not None:
            _check_sha256(partial, url, sha256)
        partial.replace(target)
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError is an OSError
        reason = getattr(error, "reason", None) or error
        raise UserError(f"--corpus {url}: cannot be downloaded: {reason}", *CORPUS_HELP[1:]) from None
    finally:
        partial.unlink(missing_ok=True)
    return target


def _check_sha256(file: Path, name: str, expected: str | None) -> str:
    actual = file_sha256(file)
    if expected is None:
        logger.warning(f"{name}: sha256 {actual}, not verified; verify later builds with --sha256 {actual}")
    elif actual != expected.lower():
        raise UserError(f"{name}: found sha256 {actual}, expected {expected} (--sha256); nothing was read from it")
    return actual


def _read_archive(path: Path, sha256: str | None) -> Corpus:
    actual_sha256 = _check_sha256(path, str(path), sha256)
    files: dict[PurePosixPath, bytes] = {}
    try:
        for name, data in _read_zip(path) if path.suffix == ".zip" else _read_tar(path):
            parts = PurePosixPath(name).parts
            if CORPUS_FOLDER not in parts:
                continue
            chapter_file = PurePosixPath(*parts[parts.index(CORPUS_FOLDER) + 1 :])
            if chapter_file in files:
                raise UserError(f"{path}: has {CORPUS_FOLDER}/{chapter_file} twice; expected one copy of the corpus")
            files[chapter_file] = data
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise UnreadableArchiveError(f"{path}: cannot be read: {error}") from None
    except (RuntimeError, NotImplementedError) as error:  # encrypted, or compressed by a method that Python lacks
        raise UserError(
            f"{path}: cannot be read: {error}; give an archive without a password, such as .tar.gz"
        ) from None
    return replace(_parse_chapters(files, str(path)), sha256=actual_sha256)


def _read_zip(path: Path) -> Iterator[tuple[str, bytes]]:
    budget = MAX_CORPUS_BYTES
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if PurePosixPath(member.filename).name in _CHAPTER_FILES:
                with archive.open(member) as stream:
                    data = _read_at_most(stream, budget, path)
                budget -= len(data)
                yield member.filename, data


def _read_tar(path: Path) -> Iterator[tuple[str, bytes]]:
    # Members are read into memory and never extracted, so a member's path cannot write anywhere.
    budget = MAX_CORPUS_BYTES
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and PurePosixPath(member.name).name in _CHAPTER_FILES:
                stream = archive.extractfile(member)
                assert stream is not None, "every regular file has content"
                data = _read_at_most(stream, budget, path)
                budget -= len(data)
                yield member.name, data


def _read_at_most(stream: IO[bytes], budget: int, path: Path) -> bytes:
    """Read a stream to its end.

    Raises:
        UserError: it has more than `budget` bytes.
    """
    chunks, remaining = [], budget
    while chunk := stream.read(_READ_CHUNK_BYTES):
        remaining -= len(chunk)
        if remaining < 0:
            raise UserError(f"{path}: its texts have over {format_bytes(MAX_CORPUS_BYTES)}; this is not the corpus")
        chunks.append(chunk)
    return b"".join(chunks)


def _parse_chapters(files: dict[PurePosixPath, bytes], source: str) -> Corpus:
    """Return the pairs of `<book>/<chapter...>/{source,target,bitext}.txt`, in the order of their paths."""
    digest = hashlib.sha256()
    pairs: list[SentencePair] = []
    skipped_chapters: list[str] = []
    for path in sorted(files):
        digest.update(files[path])
    for chapter in sorted({path.parent for path in files}):
        paths = [chapter / name for name in _CHAPTER_FILES if chapter / name in files]
        try:
            sides = _parse_chapter({path.name: files[path].decode("utf-8-sig") for path in paths})
        except (UnicodeDecodeError, ValueError) as error:
            skipped_chapters.append(f"{chapter}: {error}")
            continue
        book = chapter.parts[0] if chapter.parts else chapter.name
        pairs += [SentencePair(book, classical, modern) for classical, modern in sides]
    if not pairs:
        raise UserError(f"{source}: no sentence pairs under {CORPUS_FOLDER}/", *truncate_problems(skipped_chapters))
    if skipped_chapters:
        logger.warning(
            "\n  ".join([f"{len(skipped_chapters)} chapters skipped:", *truncate_problems(skipped_chapters)])
        )
    return Corpus(pairs, digest.hexdigest(), len(files), skipped_chapters)


def _parse_chapter(texts: dict[str, str]) -> list[tuple[str, str]]:
    """Return the pairs of one chapter: from `bitext.txt`, which aligns them explicitly, else line by line.

    Args:
        texts: the chapter's files, name to content.

    Raises:
        ValueError: the files are incomplete or not aligned.
    """
    if "bitext.txt" in texts:
        return _parse_bitext(texts["bitext.txt"])
    if missing := {"source.txt", "target.txt"} - texts.keys():
        raise ValueError(f"{', '.join(sorted(missing))} missing")
    source, target = (_stripped_lines(texts[name]) for name in ("source.txt", "target.txt"))
    if len(source) != len(target):
        raise ValueError(f"{len(source)} lines in source.txt, {len(target)} in target.txt")
    return list(zip(source, target, strict=True))


def _parse_bitext(text: str) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    classical: str | None = None
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if line.startswith(_CLASSICAL_LABEL) and classical is None:
            classical = line.removeprefix(_CLASSICAL_LABEL).strip()
        elif line.startswith(_MODERN_LABEL) and classical is not None:
            pairs.append((classical, line.removeprefix(_MODERN_LABEL).strip()))
            classical = None
        elif line:
            expected = _CLASSICAL_LABEL if classical is None else _MODERN_LABEL
            raise ValueError(f"bitext.txt line {number} does not begin with {expected}")
    if classical is not None:
        raise ValueError("bitext.txt ends before its last translation")
    return pairs


def _stripped_lines(text: str) -> list[str]:
    return [line.strip() for line in text.rstrip("\n").split("\n")]
