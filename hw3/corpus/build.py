"""`hw3 data build`: a homework-like set of rows from a public corpus. Reads from top to bottom."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hw3.common.atomic_io import write_json, write_rows
from hw3.common.errors import UserError, shorten
from hw3.common.hashing import file_sha256
from hw3.corpus import dedup as near
from hw3.corpus.dedup import Groups, Unseen, band_keys, compare_all, join_equal, join_near_duplicates
from hw3.corpus.filters import RULES, fault
from hw3.corpus.niutrans import Pair, read_corpus
from hw3.corpus.normalize import skeletons
from hw3.corpus.script_conversion import converter
from hw3.data.rows import Row, read_rows
from hw3.data.templates import Template, draw, match, slots, spell

REPORT = "data.json"
# In the order of drawing: what is drawn first is kept away from all that follows.
SPLITS = {"test": "public_test.json", "private": "private_test.json", "dev": "dev.json", "train": "train.json"}
_CHUNK = 20_000  # pairs a process works on at one time
_PROCESSES = 8  # more of them wait for the one that collects
_COMPARED = 25_000  # sentences of the rows that are compared with every excluded one in the end; more are sampled
_EXCLUDED = {near.SAME: "excluded: same", near.INSIDE: "excluded: inside", near.NEARLY: "excluded: near"}


@dataclass(frozen=True)
class Settings:
    """What decides the rows, beside the corpus and the excluded files.

    Attributes:
        convert: see `hw3.corpus.script_conversion`.
        train, dev, test, private: rows of each split; `train` None: all that are left.
        seed: of every draw.
    """

    convert: str = "s2tw"
    train: int | None = 10_000
    dev: int = 250
    test: int = 250
    private: int = 250
    seed: int = 0


@dataclass(frozen=True)
class Kept:
    """Pairs that passed every rule.

    Attributes:
        pairs: as published.
        sides: skeletons of both sides.
        keys: band keys of the Classical sides, uint64 of shape (pairs, bands).
    """

    pairs: list[Pair]
    sides: list[tuple[str, str]]
    keys: np.ndarray


def build(where: str, out: Path, settings: Settings, exclude: Sequence[Path] = (), sha256: str | None = None) -> int:
    """Read, clean, group, split, convert and write; then compare what was written with what must stay unseen.

    Args:
        where: the corpus, see `read_corpus`.
        out: the folder for the rows and the report `data.json`; made if absent.
        settings: what decides the rows.
        exclude: files of rows whose sentences must not be in any row; rows without an output are read as well.
        sha256: the checksum of the corpus, if it is an archive.

    Returns:
        0.

    Raises:
        UserError: files are there already, the corpus or an excluded file cannot be read, or too few pairs are left.
    """
    # --- check ------------------------------------------------------------------------------------------------------
    sizes = {"test": settings.test, "private": settings.private, "dev": settings.dev, "train": settings.train}
    files = {split: out / name for split, name in SPLITS.items() if sizes[split] != 0}
    if there := [path for path in (*files.values(), out / REPORT) if path.exists()]:
        names = ", ".join(map(str, there))
        raise UserError(f"{names}: there already and never written over; move what you need, or give --out FOLDER")
    converter(settings.convert)
    unseen_files, unseen = read_excluded(exclude)

    # --- read, clean, group, split ----------------------------------------------------------------------------------
    corpus = read_corpus(where, sha256, out)
    if corpus.left_out:
        print(f"{len(corpus.left_out)} chapters left out:", *shorten(corpus.left_out), sep="\n  ")
    kept, removed = clean(corpus.pairs, Unseen(unseen))
    cleaning = _print_cleaning(len(corpus.pairs), removed)
    clusters = group(kept)
    drawn, beside, verified = _split_until_unseen(kept, clusters, sizes, settings.seed, unseen)

    # --- convert and write ------------------------------------------------------------------------------------------
    report_splits = {}
    for split, path in files.items():
        pairs = [kept.pairs[number] for number in drawn[split]]
        # Evenly from the 19 slots, so both directions and every wording come as often as in the homework.
        wordings = draw(len(pairs), slots("m2c") + slots("c2m"), random.Random(f"{settings.seed} {split}"))
        write_rows(path, to_rows(_converted(pairs, settings.convert), wordings, split, settings))
        directions = Counter(template.direction for template in wordings)
        report_splits[split] = {
            "file": path.name,
            "rows": len(pairs),
            "m2c": directions["m2c"],
            "c2m": directions["c2m"],
            "books": len({pair.book for pair in pairs}),
            "sha256": file_sha256(path),
        }
    cluster_sizes = Counter(clusters)
    report = {
        "schema": 1,
        "source": {
            "name": where if "://" in where else Path(where).resolve().name,
            "sha256": corpus.sha256,
            "files": corpus.files,
            "pairs": len(corpus.pairs),
            "books": len({pair.book for pair in corpus.pairs}),
            "chapters_left_out": len(corpus.left_out),
        },
        "settings": asdict(settings),
        "excluded_files": unseen_files,
        "cleaning": cleaning,
        "clusters": {
            "pairs": len(kept.pairs),
            "clusters": len(cluster_sizes),
            "pairs_with_near_duplicates": sum(size for size in cluster_sizes.values() if size > 1),
            "largest": max(cluster_sizes.values()),
        },
        "left_out_beside_an_evaluation_sentence": beside,
        "splits": report_splits,
        "verified": verified,
        "versions": {package: version(package) for package in ("opencc", "rensa", "numpy")},
    }
    write_json(out / REPORT, report)
    _print_splits(report, out)
    return 0


def read_excluded(files: Sequence[Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """What the report says of each excluded file, and the skeletons of all their sentences, none twice.

    A row gives the text that its instruction asks to translate (the whole instruction, if it follows no template), and
    its output, if it has one.

    Raises:
        UserError: files cannot be read or hold bad rows.
    """
    described, sentences, problems = [], set(), []
    for path in files:
        try:
            rows = read_rows(path, need_output=False)
        except UserError as error:
            problems += error.problems
            continue
        own = {skeleton for skeleton in skeletons([side for row in rows for side in sides(row)]) if skeleton}
        sentences |= own
        described.append(
            {"name": path.name, "sha256": file_sha256(path), "rows": len(rows), "sentences": len(own)},
        )
    if problems:
        raise UserError(*problems)
    return described, sorted(sentences)


def sides(row: Row) -> list[str]:
    """The text that a row asks to translate and its translation, without what the template puts around them."""
    found = match(row.instruction)
    text, prefix = (found[1], found[0].answer_prefix) if found else (row.instruction, "")
    return [text] if row.output is None else [text, row.output.removeprefix(prefix)]


# ------------------------------------------------------------------------------------------------------- cleaning


def clean(pairs: list[Pair], unseen: Unseen) -> tuple[Kept, Counter[str]]:
    """The pairs that break none of `RULES`, in order, and how many broke each."""
    removed: Counter[str] = Counter()
    kept, kept_sides, keys = [], [], []
    seen: set[tuple[str, str]] = set()
    chunks = [pairs[at : at + _CHUNK] for at in range(0, len(pairs), _CHUNK)]
    work = _mapped(partial(_clean_chunk, unseen), chunks)
    with tqdm(total=len(pairs), desc="cleaning", unit="pair", unit_scale=True, disable=None, leave=False) as bar:
        for chunk, (faults, chunk_sides, chunk_keys) in zip(chunks, work, strict=True):
            removed.update(found for found in faults if found)
            good = [pair for pair, found in zip(chunk, faults, strict=True) if found is None]
            new = []
            for number, (pair, both) in enumerate(zip(good, chunk_sides, strict=True)):
                if both in seen:
                    removed["duplicate"] += 1
                    continue
                seen.add(both)
                new.append(number)
                kept.append(pair)
                kept_sides.append(both)
            keys.append(chunk_keys[new])
            bar.update(len(chunk))
    return Kept(kept, kept_sides, np.concatenate(keys)), removed


def _clean_chunk(unseen: Unseen, pairs: list[Pair]) -> tuple[list[str | None], list[tuple[str, str]], np.ndarray]:
    """For each pair the rule that it breaks or None; for the others their skeletons and Classical band keys."""
    classical = skeletons([pair.classical for pair in pairs])
    modern = skeletons([pair.modern for pair in pairs])
    faults = [
        fault(pair.classical, pair.modern, both)
        for pair, both in zip(pairs, zip(classical, modern, strict=True), strict=True)
    ]
    good = [number for number, found in enumerate(faults) if found is None]
    classical, modern = ([side[number] for number in good] for side in (classical, modern))
    keys = band_keys(classical)
    if unseen.texts:
        found = np.stack([unseen.copies(classical, keys), unseen.copies(modern, band_keys(modern))])
        found[found == 0] = max(_EXCLUDED) + 1
        kinds = found.min(axis=0)
        for number, kind in zip(good, kinds.tolist(), strict=True):
            faults[number] = _EXCLUDED.get(kind)
    else:
        kinds = np.full(len(good), max(_EXCLUDED) + 1)
    free = kinds > max(_EXCLUDED)
    both = [pair for pair, is_free in zip(zip(classical, modern, strict=True), free, strict=True) if is_free]
    return faults, both, keys[free]


def _mapped(function: Any, chunks: list[Any]) -> Iterator[Any]:
    """`map` over two or more processes where there is work for them; results in order."""
    processes = min(len(chunks), os.cpu_count() or 1, _PROCESSES)
    if processes < 2:
        yield from map(function, chunks)
        return
    # Not forked: rensa's threads do not live on in a forked process, and it would wait for them for ever.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, initializer=_share, initargs=(function,)) as pool:
        # Left early, the iterator of `map` cancels what has not begun.
        yield from pool.map(_call_shared, chunks)


_shared: Any = None


def _share(function: Any) -> None:
    """Keep the function in a process, so that what it holds travels once, not with every chunk."""
    global _shared
    # Ctrl-C reaches every process of the terminal; the one that collects ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _shared = function


def _call_shared(chunk: Any) -> Any:
    return _shared(chunk)


# -------------------------------------------------------------------------------------------------- groups, splits


def group(kept: Kept) -> list[int]:
    """The cluster of each pair: Classical texts that are near duplicates, in whatever book, and equal translations."""
    groups = Groups(len(kept.pairs))
    first: dict[str, int] = {}
    for number, (classical, _) in enumerate(kept.sides):
        groups.union(first.setdefault(classical, number), number)
    numbers = list(first.values())
    among_different = Groups(len(numbers))
    join_near_duplicates(among_different, list(first), kept.keys[numbers])
    for at, number in enumerate(numbers):
        groups.union(numbers[among_different.find(at)], number)
    join_equal(groups, [modern for _, modern in kept.sides], near.RUN)
    return [groups.find(number) for number in range(len(kept.pairs))]


def split(
    kept: Kept, clusters: list[int], sizes: dict[str, int | None], seed: int, refused: set[int]
) -> tuple[dict[str, list[int]], int]:
    """Draw the splits: one pair of a cluster, so no cluster is in two of them.

    A pair of a later split that has a sentence of an earlier one inside, or is inside one, is passed over.

    Args:
        kept: the pairs.
        clusters: the cluster of each.
        sizes: pairs of each split in the order of drawing; None: all that are left.
        seed: of the draw.
        refused: pairs never to draw.

    Returns:
        Numbers of pairs by split, and how many were passed over.

    Raises:
        UserError: there are not enough clusters.
    """
    rng = random.Random(seed)
    members: dict[int, list[int]] = {}
    for number, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(number)
    order = [rng.choice(numbers) for numbers in members.values()]
    rng.shuffle(order)
    waiting = [number for number in order if number not in refused]
    drawn: dict[str, list[int]] = {}
    earlier: list[str] = []
    passed = 0
    for name, size in sizes.items():
        unseen, chosen, at = Unseen(earlier), [], 0
        while at < len(waiting) and (size is None or len(chosen) < size):
            candidates = waiting[at : at + _CHUNK]
            modern = [kept.sides[number][1] for number in candidates]
            copies = unseen.copies([kept.sides[number][0] for number in candidates], kept.keys[candidates])
            copies += unseen.copies(modern, band_keys(modern))
            for number, copy in zip(candidates, copies.tolist(), strict=True):
                if len(chosen) == size:
                    break
                at += 1
                passed += copy > 0
                if not copy:
                    chosen.append(number)
        if size is not None and len(chosen) < size:
            needed = sum(size or 0 for size in sizes.values())
            raise UserError(
                f"{len(order):,} different sentence pairs are left after cleaning, too few for {needed:,} rows: the "
                f"{name} split would have {len(chosen):,} of {size:,}; lower --train, --dev, --test or --private"
            )
        waiting = waiting[at:]
        drawn[name] = chosen
        earlier += [text for number in chosen for text in kept.sides[number]]
    return drawn, passed


def _split_until_unseen(
    kept: Kept, clusters: list[int], sizes: dict[str, int | None], seed: int, unseen: list[str]
) -> tuple[dict[str, list[int]], int, dict[str, Any]]:
    """Draw, and compare the drawn pairs one by one with what must stay unseen; what is found is drawn no more.

    MinHash misses a near duplicate now and then (see `hw3.corpus.dedup`); this comparison does not.
    """
    refused: set[int] = set()
    found_late = 0
    while True:
        drawn, passed = split(kept, clusters, sizes, seed, refused)
        evaluation = [number for name in ("test", "private", "dev") for number in drawn[name]]
        against_evaluation, copies = _verify(kept, drawn["train"], _sentences(kept, evaluation))
        against_excluded, more = _verify(kept, [*evaluation, *drawn["train"]], unseen)
        if not copies | more:
            break
        refused |= copies | more
        found_late += len(copies | more)
    verified = {
        "train_against_evaluation": against_evaluation,
        "rows_against_excluded": against_excluded if unseen else None,
        "found_and_drawn_anew": found_late,
    }
    return drawn, passed, verified


def _verify(kept: Kept, numbers: list[int], others: list[str]) -> tuple[dict[str, Any], set[int]]:
    """What the report says of a comparison of both sides of pairs with sentences, and the pairs that are copies."""
    step = max(1, -(-2 * len(numbers) // _COMPARED))
    compared = numbers[::step]
    texts = _sentences(kept, compared)
    found = compare_all(texts, others) if others and texts else {"copies": [], "largest_similarity": 0.0}
    report = {
        "rows": len(numbers),
        "rows_compared": len(compared),
        "with_sentences": len(others),
        "copies": len(found["copies"]),
        "largest_similarity": found["largest_similarity"],
    }
    return report, {compared[text // 2] for text in found["copies"]}


def _sentences(kept: Kept, numbers: list[int]) -> list[str]:
    return [side for number in numbers for side in kept.sides[number]]


# ----------------------------------------------------------------------------------------------------------- rows


def _converted(pairs: list[Pair], conversion: str) -> Iterator[tuple[str, str]]:
    """Both sides of each pair, converted."""
    chunks = [pairs[at : at + _CHUNK] for at in range(0, len(pairs), _CHUNK)]
    return itertools.chain.from_iterable(_mapped(partial(_convert_chunk, conversion), chunks))


def _convert_chunk(conversion: str, pairs: list[Pair]) -> list[tuple[str, str]]:
    convert = converter(conversion)
    classical = convert([pair.classical.strip() for pair in pairs])
    modern = convert([pair.modern.strip() for pair in pairs])
    return list(zip(classical, modern, strict=True))


def to_rows(
    pairs: Iterable[tuple[str, str]], wordings: Sequence[Template], name: str, settings: Settings
) -> list[dict[str, str]]:
    """One row a pair, in the homework's shape.

    Args:
        pairs: Classical and modern text, converted.
        wordings: the template of each, which decides its direction.
        name: of the split; `private` rows have no output.
        settings: conversion and seed.
    """
    rows = []
    for number, ((classical, modern), template) in enumerate(zip(pairs, wordings, strict=True)):
        text, output = (modern, classical) if template.direction == "m2c" else (classical, modern)
        instruction = spell(template, settings.convert).render(text)
        row = {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"hw3:{settings.seed}:{name}:{number}:{instruction}")),
            "instruction": instruction,
        }
        if name != "private":
            row["output"] = template.answer_prefix + output
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------------- tables


def _print_cleaning(read: int, removed: Counter[str]) -> list[dict[str, Any]]:
    """Print and return one line a rule."""
    print(f"{'':<20}{'removed':>9}{'left':>10}\n{'read':<20}{'':>9}{read:>10,}")
    lines, left = [], read
    for rule, meaning in RULES.items():
        left -= removed[rule]
        lines.append({"rule": rule, "removed": removed[rule], "left": left})
        print(f"{rule:<20}{removed[rule]:>9,}{left:>10,}  {meaning}")
    return lines


def _print_splits(report: dict[str, Any], out: Path) -> None:
    clusters, verified = report["clusters"], report["verified"]
    print(
        f"\n{clusters['clusters']:,} clusters; {clusters['pairs_with_near_duplicates']:,} pairs have near duplicates, "
        f"the largest cluster {clusters['largest']:,}"
    )
    for entry in report["splits"].values():
        print(
            f"{out / entry['file']}: {entry['rows']:,} rows, {entry['m2c']:,} modern to Classical, {entry['c2m']:,} "
            f"Classical to modern, from {entry['books']} books"
        )
    for key, words in (("train_against_evaluation", "evaluation"), ("rows_against_excluded", "excluded")):
        found = verified[key]
        if found is not None:
            print(
                f"verified: {found['copies']} of {found['rows_compared']:,} rows have one of "
                f"{found['with_sentences']:,} {words} sentences in them; the most similar one is at "
                f"{found['largest_similarity']:.2f} (near duplicates: {near.NEAR:g})"
            )
    print(f"{out / REPORT}: source, counts, checksums")
