"""Build data/train.json and data/eval.json, the sample rows, from the sentence pairs in data/pairs.

    python tools/build_sample.py

A pairs file is named after its genre and has one pair per line, Classical<TAB>modern. Each pair becomes two rows, one
per direction. Both rows go to the same file: EVAL_PAIRS_PER_GENRE pairs of every genre to the evaluation file, the
others to the training file. A row's id is genre, line and direction: histories-012-c2m. The same pairs give the same
files, byte for byte. The script ends with status 2 if pairs are bad or the two files would share a sentence.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path
from typing import NamedTuple

from hw3.data.templates import list_templates, sample_templates

SEED = 20241103
EVAL_PAIRS_PER_GENRE = 12
MIN_SHARED_SENTENCE_CHARACTERS = 8  # a shorter sentence may occur in both files
# CJK ideographs and full-width punctuation; no Latin letters, digits or spaces.
ALLOWED_CHARACTERS = re.compile("[\u4e00-\u9fff，。：；？！、「」『』《》〈〉（）—…]*")


class SamplePair(NamedTuple):
    """One line of a pairs file. The genre is the file's stem, and lines are counted from 1."""

    genre: str
    line: int
    classical: str
    modern: str

    @property
    def name(self) -> str:
        """The beginning of its rows' ids, such as histories-012."""
        return f"{self.genre}-{self.line:03d}"

    @property
    def sides(self) -> tuple[str, str]:
        """The Classical and the modern text."""
        return self.classical, self.modern


def parse_pairs(genre: str, text: str) -> tuple[list[SamplePair], list[str]]:
    """Return the pairs of one file, and a message for every bad line."""
    pairs, problems = [], []
    for line, row in enumerate(text.removesuffix("\n").split("\n"), start=1):
        columns = row.split("\t")
        location = f"{genre}.tsv:{line}"
        if len(columns) != 2 or not all(columns):
            problems.append(f"{location}: expected Classical<TAB>modern, found {len(columns)} column(s): {row!r}")
            continue
        bad = sorted({c for column in columns for c in ALLOWED_CHARACTERS.sub("", column)})
        if bad:
            problems.append(f"{location}: neither Chinese characters nor full-width punctuation: {bad}")
        if columns[0] == columns[1]:
            problems.append(f"{location}: both sides are the same: {columns[0]}")
        pairs.append(SamplePair(genre, line, *columns))
    return pairs, problems


def find_repeated_sides(pairs: list[SamplePair]) -> list[str]:
    """Return a message for every side that an earlier pair also has."""
    first_pair: dict[str, SamplePair] = {}
    problems = []
    for pair in pairs:
        for side in dict.fromkeys(pair.sides):
            other = first_pair.setdefault(side, pair)
            if other is not pair:
                problems.append(f"{pair.genre}.tsv:{pair.line}: as in {other.genre}.tsv:{other.line}: {side}")
    return problems


def split_pairs(pairs: list[SamplePair]) -> tuple[list[SamplePair], list[SamplePair]]:
    """Return the pairs for training and for evaluation, both in the files' order.

    Each genre is drawn separately, so a pair added to one genre does not change the draw of the others.
    """
    evaluation: set[SamplePair] = set()
    for genre in sorted({pair.genre for pair in pairs}):
        genre_pairs = [pair for pair in pairs if pair.genre == genre]
        evaluation.update(random.Random(f"{SEED} {genre}").sample(genre_pairs, EVAL_PAIRS_PER_GENRE))
    return [pair for pair in pairs if pair not in evaluation], [pair for pair in pairs if pair in evaluation]


def long_sentences(side: str) -> set[str]:
    """Return the sentences of a side that have `MIN_SHARED_SENTENCE_CHARACTERS` or more characters."""
    return {sentence for sentence in re.split("[。！？；]", side) if len(sentence) >= MIN_SHARED_SENTENCE_CHARACTERS}


def find_shared_texts(train: list[SamplePair], evaluation: list[SamplePair]) -> list[str]:
    """Return a message for every side of one split inside a side of the other, and for every shared sentence."""
    problems = []
    for pair in train:
        for other in evaluation:
            for side in pair.sides:
                for other_side in other.sides:
                    shared = long_sentences(side) & long_sentences(other_side)
                    shared.update(min((s, t), key=len) for s, t in [(side, other_side)] if s in t or t in s)
                    problems += [f"{pair.name} (train) and {other.name} (eval) share: {s}" for s in sorted(shared)]
    return problems


def make_rows(pairs: list[SamplePair], split: str) -> list[dict[str, str]]:
    """Return two rows `{"id", "instruction", "output"}` per pair, modern to Classical first."""
    rows = []
    drawn = {
        direction: sample_templates(len(pairs), list_templates(direction), random.Random(f"{SEED} {split} {direction}"))
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
                    "output": template.output_prefix + target,
                }
            )
    return rows


def read_pairs(folder: Path) -> list[SamplePair]:
    """Read every pair of `folder`/*.tsv.

    Raises:
        ValueError: lines are bad; all of them are listed.
    """
    files = sorted(folder.glob("*.tsv"))
    if not files:
        raise ValueError(f"no *.tsv in {folder}")
    pairs, problems = [], []
    for file in files:
        file_pairs, file_problems = parse_pairs(file.stem, file.read_text(encoding="utf-8"))
        pairs += file_pairs
        problems += file_problems
    problems += find_repeated_sides(pairs)
    if problems:
        raise ValueError("\n".join(problems))
    return pairs


def main() -> int:
    """Build both files and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, default=Path("data/pairs"), help="folder of the pairs files")
    parser.add_argument("--output", type=Path, default=Path("data"), help="folder for train.json and eval.json")
    arguments = parser.parse_args()
    try:
        train, evaluation = split_pairs(read_pairs(arguments.pairs))
        if problems := find_shared_texts(train, evaluation):
            raise ValueError("\n".join(problems))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for split, pairs in (("train", train), ("eval", evaluation)):
        rows = make_rows(pairs, split)
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
        (arguments.output / f"{split}.json").write_text(text, encoding="utf-8")
        print(f"{split}.json: {len(rows)} rows from {len(pairs)} pairs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
