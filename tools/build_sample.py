"""Builds data/train.json and data/eval.json, the sample rows, from the sentence pairs in data/pairs.

A pairs file is named for its genre and holds one pair a line, Classical<TAB>modern. Each pair becomes two
rows, one for each direction, and goes as a whole to one of the two files: EVAL_PAIRS_PER_GENRE of every genre
are for evaluation. A row's id is genre, line and direction: histories-012-c2m. The same pairs give the same
files, byte for byte.

    python tools/build_sample.py
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path
from typing import NamedTuple

from hw3.data.templates import draw, slots

SEED = 20241103
EVAL_PAIRS_PER_GENRE = 12
SHORTEST_SENTENCE = 8
# CJK ideographs and full-width punctuation; no Latin letters, digits or spaces.
ALLOWED = re.compile("[\u4e00-\u9fff，。：；？！、「」『』《》〈〉（）—…]*")


class Pair(NamedTuple):
    """One line of a pairs file: the genre is the file's stem, the line counts from 1."""

    genre: str
    line: int
    classical: str
    modern: str

    @property
    def name(self) -> str:
        """The start of its rows' ids: histories-012."""
        return f"{self.genre}-{self.line:03d}"

    @property
    def sides(self) -> tuple[str, str]:
        return self.classical, self.modern


def parse_pairs(genre: str, text: str) -> tuple[list[Pair], list[str]]:
    """The pairs of one file, and a message for every bad line."""
    pairs, problems = [], []
    for line, row in enumerate(text.removesuffix("\n").split("\n"), start=1):
        columns = row.split("\t")
        where = f"{genre}.tsv:{line}"
        if len(columns) != 2 or not all(columns):
            problems.append(f"{where}: expected Classical<TAB>modern, found {len(columns)} column(s): {row!r}")
            continue
        bad = sorted({c for column in columns for c in ALLOWED.sub("", column)})
        if bad:
            problems.append(f"{where}: neither Chinese characters nor full-width punctuation: {bad}")
        if columns[0] == columns[1]:
            problems.append(f"{where}: both sides are the same: {columns[0]}")
        pairs.append(Pair(genre, line, *columns))
    return pairs, problems


def repeated_sides(pairs: list[Pair]) -> list[str]:
    """A message for every side that an earlier pair has already."""
    first: dict[str, Pair] = {}
    problems = []
    for pair in pairs:
        for side in dict.fromkeys(pair.sides):
            other = first.setdefault(side, pair)
            if other is not pair:
                problems.append(f"{pair.genre}.tsv:{pair.line}: as in {other.genre}.tsv:{other.line}: {side}")
    return problems


def split_pairs(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Pairs for training and for evaluation, EVAL_PAIRS_PER_GENRE of each genre, both in the files' order.

    Each genre is drawn by itself, so a pair added to one genre leaves the others as they were.
    """
    evaluation: set[Pair] = set()
    for genre in sorted({pair.genre for pair in pairs}):
        of_genre = [pair for pair in pairs if pair.genre == genre]
        evaluation.update(random.Random(f"{SEED} {genre}").sample(of_genre, EVAL_PAIRS_PER_GENRE))
    return [pair for pair in pairs if pair not in evaluation], [pair for pair in pairs if pair in evaluation]


def sentences(side: str) -> set[str]:
    """The sentences of ``side`` that have SHORTEST_SENTENCE or more characters."""
    return {s for s in re.split("[。！？；]", side) if len(s) >= SHORTEST_SENTENCE}


def shared_texts(train: list[Pair], evaluation: list[Pair]) -> list[str]:
    """A message for every side of one split inside a side of the other, and every sentence that both have."""
    problems = []
    for pair in train:
        for other in evaluation:
            for side in pair.sides:
                for other_side in other.sides:
                    shared = sentences(side) & sentences(other_side)
                    shared.update(min((s, t), key=len) for s, t in [(side, other_side)] if s in t or t in s)
                    problems += [f"{pair.name} (train) and {other.name} (eval) share: {s}" for s in sorted(shared)]
    return problems


def to_rows(pairs: list[Pair], split: str) -> list[dict[str, str]]:
    """Two rows for each pair, ``{"id", "instruction", "output"}``, modern to Classical first."""
    rows = []
    drawn = {
        direction: draw(len(pairs), slots(direction), random.Random(f"{SEED} {split} {direction}"))
        for direction in ("m2c", "c2m")
    }
    templates = zip(drawn["m2c"], drawn["c2m"], strict=True)
    for pair, (to_classical, to_modern) in zip(pairs, templates, strict=True):
        for template, source, target in (
            (to_classical, pair.modern, pair.classical),
            (to_modern, pair.classical, pair.modern),
        ):
            rows.append(
                {
                    "id": f"{pair.name}-{template.direction}",
                    "instruction": template.render(source),
                    "output": template.answer_prefix + target,
                }
            )
    return rows


def read_pairs(folder: Path) -> list[Pair]:
    """Every pair of ``folder``/*.tsv. Raises ValueError that lists every bad line."""
    files = sorted(folder.glob("*.tsv"))
    if not files:
        raise ValueError(f"no *.tsv in {folder}")
    pairs, problems = [], []
    for file in files:
        found, bad = parse_pairs(file.stem, file.read_text(encoding="utf-8"))
        pairs += found
        problems += bad
    problems += repeated_sides(pairs)
    if problems:
        raise ValueError("\n".join(problems))
    return pairs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, default=Path("data/pairs"), help="folder of the pairs files")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder for train.json and eval.json")
    arguments = parser.parse_args()
    try:
        train, evaluation = split_pairs(read_pairs(arguments.pairs))
        if problems := shared_texts(train, evaluation):
            raise ValueError("\n".join(problems))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for name, pairs in (("train", train), ("eval", evaluation)):
        rows = to_rows(pairs, name)
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
        (arguments.out / f"{name}.json").write_text(text, encoding="utf-8")
        print(f"{name}.json: {len(rows)} rows from {len(pairs)} pairs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
