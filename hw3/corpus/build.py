"""`hw3 data build`: build homework-like training and evaluation rows from a public corpus."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import random
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

from hw3.common.atomic_io import write_json, write_json_rows
from hw3.common.disk import check_writable
from hw3.common.errors import UserError
from hw3.common.hashing import file_sha256
from hw3.corpus.build_report import (
    REPORT_FILE,
    BuildReport,
    BuildSettings,
    ClusterSummary,
    CorpusSummary,
    SplitSummary,
    print_cleaning,
    print_splits,
)
from hw3.corpus.cleaning import clean_pairs
from hw3.corpus.dedup import LeakageIndex
from hw3.corpus.excluded import read_excluded_files
from hw3.corpus.niutrans import Corpus, SentencePair, read_corpus
from hw3.corpus.parallel import parallel_map, split_into_chunks
from hw3.corpus.script_conversion import make_converter
from hw3.corpus.splitting import cluster_pairs, draw_verified_splits
from hw3.data.templates import Template, list_templates, sample_templates, to_script
from hw3.runs.lock import LOCK_FILE, exclusive_lock

# In sampling order: later splits skip copies of what earlier splits have.
SPLIT_FILES = {"test": "public_test.json", "private": "private_test.json", "dev": "dev.json", "train": "train.json"}

_STAGING_DIR = ".data-build"  # in the output folder, while files are written

logger = logging.getLogger(__name__)


def build_dataset(
    source: str, output: Path, settings: BuildSettings, exclude: Sequence[Path] = (), sha256: str | None = None
) -> int:
    """Read a corpus, clean, cluster and split it without leakage, and write the rows of each split.

    Args:
        source: the corpus, see `read_corpus`.
        output: the folder for the rows and the report `data.json`; created if absent.
        settings: split sizes, script and seed.
        exclude: files of rows whose sentences must not be in any built row. Rows without an output count as well.
        sha256: the expected checksum of the corpus, if it is an archive.

    Returns:
        0.

    Raises:
        UserError: output files exist already, the corpus or an excluded file cannot be read, or too few pairs remain.
    """
    check_writable(output, "--output")
    with exclusive_lock(output / LOCK_FILE, str(output)):
        return _build(source, output, settings, exclude, sha256)


def _build(source: str, output: Path, settings: BuildSettings, exclude: Sequence[Path], sha256: str | None) -> int:
    # --- Refuse wrong arguments before anything is read ---
    sizes = {split: getattr(settings, split) for split in SPLIT_FILES}
    # A size of 0 leaves the split out; None takes all pairs that remain.
    files = {split: name for split, name in SPLIT_FILES.items() if sizes[split] != 0}
    _prepare_output(output, [*files.values(), REPORT_FILE])
    make_converter(settings.convert)  # raises if its package is not installed
    excluded_files, excluded_sentences = read_excluded_files(exclude)

    # --- Read ---
    logger.info(f"1/5 reading {source}")
    corpus = read_corpus(source, sha256, output)

    # --- Clean, cluster, split ---
    logger.info(f"2/5 cleaning {len(corpus.pairs):,} pairs")
    clean, rule_counts = clean_pairs(corpus.pairs, LeakageIndex(excluded_sentences))
    print_cleaning(len(corpus.pairs), rule_counts)
    logger.info(f"3/5 clustering {len(clean.pairs):,} pairs")
    clusters = cluster_pairs(clean)
    logger.info("4/5 drawing splits, and comparing them with one another")
    drawn, leakage_checks = draw_verified_splits(clean, clusters, sizes, settings.seed, excluded_sentences)

    # --- Convert and write ---
    logger.info("5/5 converting and writing")
    with _staged_files(output) as staging:
        pairs = {split: [clean.pairs[index] for index in drawn.indices[split]] for split in files}
        splits = {split: _write_split(staging / files[split], split, pairs[split], settings) for split in files}
        report = BuildReport(
            schema=1,
            source=_summarize_corpus(source, corpus),
            settings=settings,
            excluded_files=excluded_files,
            cleaning=rule_counts,
            clusters=_summarize_clusters(clusters),
            skipped_pairs=drawn.skipped_pairs,
            splits=splits,
            leakage_checks=leakage_checks,
            versions={package: version(package) for package in ("opencc", "rensa", "numpy")},
        )
        write_json(staging / REPORT_FILE, asdict(report))
    print_splits(report, output)
    return 0


@contextlib.contextmanager
def _staged_files(output: Path) -> Iterator[Path]:
    """Yield a new folder for files, and move them to `output` at the end of the block, the report last.

    So a build that is killed leaves no part of its files where the next build would find them.
    """
    staging = output / _STAGING_DIR
    staging.mkdir(parents=True)
    try:
        yield staging
    except BaseException:
        shutil.rmtree(staging)
        raise
    for path in sorted(staging.iterdir(), key=lambda path: path.name == REPORT_FILE):
        path.rename(output / path.name)
    staging.rmdir()


def _remove_interrupted_build(output: Path) -> None:
    """Remove the files of a build that was killed while it wrote or moved them."""
    staging = output / _STAGING_DIR
    if (staging / REPORT_FILE).is_file():  # all files are written, and some of them may have been moved
        report = json.loads((staging / REPORT_FILE).read_text(encoding="utf-8"))
        for split in report["splits"].values():
            moved = output / split["file"]
            if moved.is_file() and file_sha256(moved) == split["sha256"]:
                moved.unlink()
    if staging.is_dir():
        shutil.rmtree(staging)


def _prepare_output(output: Path, names: Iterable[str]) -> None:
    """Remove what an interrupted build has left, and check that the files do not exist.

    Raises:
        UserError: one of the files exists.
    """
    _remove_interrupted_build(output)
    if existing := [str(output / name) for name in names if os.path.lexists(output / name)]:
        raise UserError(
            f"{', '.join(existing)}: exists already and is never overwritten; move it or give another --output FOLDER"
        )


def _write_split(path: Path, split: str, pairs: list[SentencePair], settings: BuildSettings) -> SplitSummary:
    # The 19 templates, counted with their weights, are drawn evenly, as often as in the homework: m2c is modern to
    # Classical Chinese, c2m Classical to modern.
    slots = list_templates("m2c") + list_templates("c2m")
    templates = sample_templates(len(pairs), slots, random.Random(f"{settings.seed} {split}"))
    write_json_rows(path, make_rows(_convert(pairs, settings.convert), templates, split, settings))
    directions = Counter(template.direction for template in templates)
    return SplitSummary(
        file=path.name,
        rows=len(pairs),
        m2c=directions["m2c"],
        c2m=directions["c2m"],
        books=len({pair.book for pair in pairs}),
        sha256=file_sha256(path),
    )


def _convert(pairs: list[SentencePair], conversion: str) -> Iterator[tuple[str, str]]:
    """Yield both sides of each pair, converted."""
    return itertools.chain.from_iterable(parallel_map(partial(_convert_chunk, conversion), split_into_chunks(pairs)))


def _convert_chunk(conversion: str, pairs: Sequence[SentencePair]) -> list[tuple[str, str]]:
    convert = make_converter(conversion)
    classical = convert([pair.classical.strip() for pair in pairs])
    modern = convert([pair.modern.strip() for pair in pairs])
    return list(zip(classical, modern, strict=True))


def make_rows(
    pairs: Iterable[tuple[str, str]], templates: Sequence[Template], split: str, settings: BuildSettings
) -> list[dict[str, str]]:
    """Return one row per pair, in the homework's format.

    Args:
        pairs: Classical and modern text, converted.
        templates: the template of each pair, which decides the direction.
        split: name of the split; rows of "private" have no output.
        settings: conversion and seed.
    """
    rows = []
    for number, ((classical, modern), template) in enumerate(zip(pairs, templates, strict=True)):
        text, output = (modern, classical) if template.direction == "m2c" else (classical, modern)
        instruction = to_script(template, settings.convert).render(text)
        row = {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"hw3:{settings.seed}:{split}:{number}:{instruction}")),
            "instruction": instruction,
        }
        if split != "private":
            row["output"] = template.output_prefix + output
        rows.append(row)
    return rows


def _summarize_corpus(source: str, corpus: Corpus) -> CorpusSummary:
    return CorpusSummary(
        name=source if "://" in source else Path(source).resolve().name,
        sha256=corpus.sha256,
        files=corpus.files,
        pairs=len(corpus.pairs),
        books=len({pair.book for pair in corpus.pairs}),
        skipped_chapters=len(corpus.skipped_chapters),
    )


def _summarize_clusters(clusters: Sequence[int]) -> ClusterSummary:
    sizes = Counter(clusters)
    return ClusterSummary(
        pairs=len(clusters),
        clusters=len(sizes),
        pairs_with_near_duplicates=sum(size for size in sizes.values() if size > 1),
        largest_cluster=max(sizes.values()),
    )
