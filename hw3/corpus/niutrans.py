"""Sentence pairs of NiuTrans/Classical-Modern, from wherever they lie: a clone, an archive of one, a download, parts.

A clone has `双语数据/<book>/<chapter...>/bitext.txt`, blocks of `古文：...` and `现代文：...`, with the same sentences
line by line in `source.txt` and `target.txt`. Parts are `*.tsv.xz` files with lines `book<TAB>classical<TAB>modern`.
Everything is in simplified characters, as published.
"""

from __future__ import annotations

import hashlib
import lzma
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tqdm import tqdm

from hw3.common.errors import UserError, shorten
from hw3.common.hashing import file_sha256

FOLDER = "双语数据"
_FILES = ("bitext.txt", "source.txt", "target.txt")
_CLASSICAL, _MODERN = "古文：", "现代文："
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
HOW_TO_GET = (
    "give the corpus: --corpus PATH (make data CORPUS=PATH), one of",
    "  a clone: git clone --depth 1 https://github.com/NiuTrans/Classical-Modern",
    "  an archive of it, a file or an address: https://github.com/NiuTrans/Classical-Modern/archive/COMMIT.tar.gz, "
    "held to its checksum by --sha256",
    "  a folder of *.tsv.xz parts: book, classical, modern",
)


class Pair(NamedTuple):
    """A sentence and its translation, as published."""

    book: str
    classical: str
    modern: str


@dataclass(frozen=True)
class Corpus:
    """What was read.

    Attributes:
        pairs: in the order of the files' names.
        sha256: of the bytes of all files read, one after another; of the archive itself, if it was one.
        files: how many were read.
        left_out: chapters (`book/chapter`) that could not be read as pairs, and why.
    """

    pairs: list[Pair]
    sha256: str
    files: int
    left_out: list[str] = field(default_factory=list)


def read_corpus(where: str, sha256: str | None, download_to: Path) -> Corpus:
    """Read the pairs of a folder, an archive or an address.

    Args:
        where: a clone, a folder of parts, an archive's path, or an `http(s)://` or `file://` address of an archive.
        sha256: what an archive must have, in hex; None: not checked.
        download_to: the folder where a downloaded archive is kept; one that is there already is not fetched again.

    Raises:
        UserError: there is no such thing, its checksum is another, or it holds no pairs.
    """
    if "://" in where:
        return _read_archive(download(where, download_to, sha256), sha256)
    path = Path(where)
    if path.is_file() and path.name.endswith(_ARCHIVES):
        return _read_archive(path, sha256)
    if not path.is_dir():
        raise UserError(f"--corpus {where}: no such folder, and no archive ({', '.join(_ARCHIVES)})", *HOW_TO_GET[1:])
    if sha256 is not None:
        raise UserError(f"--sha256 is the checksum of an archive; {where} is a folder")
    if sorted(path.glob("*.tsv.xz")):
        return read_parts(path)
    root = path if path.name == FOLDER else path / FOLDER
    if not root.is_dir():
        raise UserError(f"{where}: neither {FOLDER}/ nor *.tsv.xz there", *HOW_TO_GET[1:])
    files = {
        PurePosixPath(file.relative_to(root).as_posix()): file.read_bytes()
        for file in root.rglob("*.txt")
        if file.name in _FILES
    }
    return _from_chapters(files, where)


def read_parts(folder: Path) -> Corpus:
    """Every `*.tsv.xz` of a folder.

    Raises:
        UserError: there is none, or lines have not three fields; each is named.
    """
    files = sorted(folder.glob("*.tsv.xz"))
    if not files:
        raise UserError(f"{folder}: no *.tsv.xz file there")
    digest = hashlib.sha256()
    pairs: list[Pair] = []
    problems: list[str] = []
    for file in files:
        packed = file.read_bytes()
        digest.update(packed)
        try:
            text = lzma.decompress(packed).decode()
        except (lzma.LZMAError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read: {error}") from None
        for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
            fields = line.split("\t")
            if len(fields) == 3:
                pairs.append(Pair(*fields))
            else:
                problems.append(f"{file}:{number}: {len(fields)} fields; three are needed, separated by tabs")
    if problems:
        raise UserError(*shorten(problems))
    return Corpus(pairs, digest.hexdigest(), len(files))


def download(address: str, folder: Path, sha256: str | None) -> Path:
    """Fetch an archive to `folder`, with progress; the file is there when it is complete and has the checksum.

    Raises:
        UserError: it cannot be fetched, or its checksum is another.
    """
    target = folder / PurePosixPath(address.partition("?")[0]).name
    if not target.name.endswith(_ARCHIVES):
        raise UserError(f"--corpus {address}: not the address of an archive ({', '.join(_ARCHIVES)})")
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.part")
    try:
        with urllib.request.urlopen(address, timeout=60) as response, partial.open("wb") as file:
            size = int(response.headers.get("Content-Length") or 0) or None
            with tqdm.wrapattr(response, "read", total=size, desc=target.name, disable=None) as stream:
                shutil.copyfileobj(stream, file, 2**20)
        if sha256 is not None:
            _check_sha256(partial, address, sha256)
        partial.replace(target)
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"--corpus {address}: cannot be fetched: {reason}", *HOW_TO_GET[1:]) from None
    finally:
        partial.unlink(missing_ok=True)
    return target


def _check_sha256(file: Path, name: str, sha256: str | None) -> str:
    found = file_sha256(file)
    if sha256 is None:
        print(f"{name}: sha256 {found}, not checked; --sha256 {found} holds later builds to it", file=sys.stderr)
    elif found != sha256.lower():
        raise UserError(f"{name}: its sha256 is {found}, --sha256 says {sha256}; nothing was read from it")
    return found


def _read_archive(path: Path, sha256: str | None) -> Corpus:
    found = _check_sha256(path, str(path), sha256)
    try:
        members = dict(_zip_members(path) if path.suffix == ".zip" else _tar_members(path))
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    files = {}
    for name, data in members.items():
        parts = PurePosixPath(name).parts
        if FOLDER in parts and parts[-1] in _FILES:
            files[PurePosixPath(*parts[parts.index(FOLDER) + 1 :])] = data
    corpus = _from_chapters(files, str(path))
    return Corpus(corpus.pairs, found, corpus.files, corpus.left_out)


def _zip_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(_FILES):
                yield name, archive.read(name)


def _tar_members(path: Path) -> Iterator[tuple[str, bytes]]:
    # Read, never unpacked: a member's path leads nowhere.
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(_FILES):
                yield member.name, archive.extractfile(member).read()


def _from_chapters(files: dict[PurePosixPath, bytes], where: str) -> Corpus:
    """Pairs of `<book>/<chapter...>/{source,target,bitext}.txt`, in the order of their paths."""
    digest = hashlib.sha256()
    pairs: list[Pair] = []
    left_out: list[str] = []
    for path in sorted(files):
        digest.update(files[path])
    for chapter in sorted({path.parent for path in files}):
        try:
            texts = {path.name: files[path].decode("utf-8-sig") for path in _of(chapter, files)}
            sides = _read_chapter(texts)
        except (UnicodeDecodeError, ValueError) as error:
            left_out.append(f"{chapter}: {error}")
            continue
        book = chapter.parts[0] if chapter.parts else chapter.name
        pairs += [Pair(book, classical, modern) for classical, modern in sides]
    if not pairs:
        raise UserError(f"{where}: no sentence pairs under {FOLDER}/", *shorten(left_out))
    return Corpus(pairs, digest.hexdigest(), len(files), left_out)


def _of(chapter: PurePosixPath, files: dict[PurePosixPath, bytes]) -> Iterable[PurePosixPath]:
    return (chapter / name for name in _FILES if chapter / name in files)


def _read_chapter(texts: dict[str, str]) -> list[tuple[str, str]]:
    """The pairs of one chapter: `bitext.txt`, which says itself what belongs together, else the two files by line.

    Raises:
        ValueError: says what does not fit.
    """
    if "bitext.txt" in texts:
        return _read_bitext(texts["bitext.txt"])
    if missing := {"source.txt", "target.txt"} - texts.keys():
        raise ValueError(f"{', '.join(sorted(missing))} missing")
    source, target = (_lines(texts[name]) for name in ("source.txt", "target.txt"))
    if len(source) != len(target):
        raise ValueError(f"{len(source)} lines in source.txt, {len(target)} in target.txt")
    return list(zip(source, target, strict=True))


def _read_bitext(text: str) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    classical: str | None = None
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if line.startswith(_CLASSICAL) and classical is None:
            classical = line.removeprefix(_CLASSICAL).strip()
        elif line.startswith(_MODERN) and classical is not None:
            pairs.append((classical, line.removeprefix(_MODERN).strip()))
            classical = None
        elif line:
            expected = _CLASSICAL if classical is None else _MODERN
            raise ValueError(f"bitext.txt line {number} does not begin with {expected}")
    if classical is not None:
        raise ValueError("bitext.txt ends before its last translation")
    return pairs


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.rstrip("\n").split("\n")]
