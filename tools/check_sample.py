"""Check that the sample rows are original: no side of 8 or more characters occurs in the given collections.

    python tools/check_sample.py --homework DIR --corpus DIR

The homework's DIR has train.json and public_test.json, rows of {id, instruction, output}. The corpus's DIR has
NiuTrans/Classical-Modern as pairs-0*.tsv.xz, lines of book, Classical, modern. Sides are compared as substrings in
simplified characters: once with punctuation, once without punctuation and white space. The script writes
docs/sample-check.json, which names lines of the sample and source files but quotes no text. It ends with status 1 if
there is a match, and with 2 if files are missing. It needs the packages opencc and pyahocorasick.
"""

import argparse
import hashlib
import json
import lzma
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import ahocorasick
from build_sample import SamplePair, read_pairs

from hw3.corpus.normalize import remove_punctuation, to_simplified

MIN_SIDE_CHARACTERS = 8
GRAM_CHARACTERS = 8  # common substrings are found by a gram of this length; shorter ones count as "shorter"
HOMEWORK_FILES = ("train.json", "public_test.json")


class Source(NamedTuple):
    """A file to compare with; `text` has its texts in simplified characters, one per line."""

    name: str
    sha256: str
    pairs: int
    text: str


def read_sources(homework: Path, corpus: Path) -> Iterator[Source]:
    """Yield the files of both folders one at a time, because a corpus part takes some hundred MB of memory."""
    for name in HOMEWORK_FILES:
        data = (homework / name).read_bytes()
        rows = json.loads(data)
        text = "\n".join(row[key] for row in rows for key in ("instruction", "output"))
        yield Source(f"homework/{name}", hashlib.sha256(data).hexdigest(), len(rows), to_simplified(text))
    for path in list_corpus_parts(corpus):
        data = path.read_bytes()
        lines = lzma.decompress(data).decode().removesuffix("\n").split("\n")
        text = "\n".join(side for line in lines for side in line.split("\t")[1:])
        yield Source(f"corpus/{path.name}", hashlib.sha256(data).hexdigest(), len(lines), to_simplified(text))


def list_corpus_parts(corpus: Path) -> list[Path]:
    """Return the parts of the corpus, sorted by name."""
    return sorted(corpus.glob("pairs-0*.tsv.xz"))


def find_missing_files(homework: Path, corpus: Path) -> list[str]:
    """Return the files that the comparison needs and that do not exist."""
    missing = [str(homework / name) for name in HOMEWORK_FILES if not (homework / name).is_file()]
    return missing + ([] if list_corpus_parts(corpus) else [str(corpus / "pairs-0*.tsv.xz")])


class SubstringSearch:
    """A search for many sides in long texts, which also measures the longest common substring of each side.

    Args:
        sides: name to text.

    Attributes:
        longest: name to the length of the side's longest common substring with any text searched so far.
    """

    def __init__(self, sides: dict[str, str]) -> None:
        self.sides = sides
        self.longest = dict.fromkeys(sides, 0)
        occurrences: dict[str, list[tuple[str, int]]] = {}
        for name, side in sides.items():
            # A side that is shorter than a gram once its punctuation is removed is its own gram.
            for start in range(max(len(side) - GRAM_CHARACTERS, 0) + 1):
                occurrences.setdefault(side[start : start + GRAM_CHARACTERS], []).append((name, start))
        self._grams = ahocorasick.Automaton()
        for gram, positions in occurrences.items():
            self._grams.add_word(gram, (len(gram), positions))
        self._grams.make_automaton()

    def search(self, text: str) -> list[str]:
        """Return the names of the sides that occur in `text`, and update `longest`."""
        matches = set()
        for end, (length, positions) in self._grams.iter(text):
            text_start = end + 1 - length
            for name, start in positions:
                side = self.sides[name]
                common = length
                while (
                    start + common < len(side)
                    and text[text_start + common : text_start + common + 1] == side[start + common]
                ):
                    common += 1
                self.longest[name] = max(self.longest[name], common)
                if common == len(side):
                    matches.add(name)
        return sorted(matches)

    def count_lengths(self) -> dict[str, int]:
        """Return the number of sides per length of the longest common substring, shortest first."""
        counts: dict[str, int] = {}
        for length in sorted(self.longest.values()):
            key = str(length) if length >= GRAM_CHARACTERS else "shorter"
            counts[key] = counts.get(key, 0) + 1
        return counts


def check_pairs(pairs: list[SamplePair], sources: Iterator[Source]) -> dict[str, Any]:
    """Return the report: what was compared, and every match as a side of the sample and the source's file name."""
    sides = {
        f"{pair.name} {column}": to_simplified(side)
        for pair in pairs
        for column, side in zip(("classical", "modern"), pair.sides, strict=True)
        if len(side) >= MIN_SIDE_CHARACTERS
    }
    searches = {
        "with_punctuation": SubstringSearch(sides),
        "without_punctuation": SubstringSearch({name: remove_punctuation(side) for name, side in sides.items()}),
    }
    matches: dict[str, list[dict[str, str]]] = {form: [] for form in searches}
    inputs = []
    for source in sources:
        inputs.append(
            {
                "source": source.name,
                "sha256": source.sha256,
                "pairs": source.pairs,
                "characters": len(source.text) - source.text.count("\n"),
            }
        )
        texts = {"with_punctuation": source.text, "without_punctuation": remove_punctuation(source.text)}
        for form, text in texts.items():
            matches[form] += [{"side": name, "source": source.name} for name in searches[form].search(text)]
    return {
        "pairs": len(pairs),
        "sides_checked": len(sides),
        "sides_shorter_than_8_not_checked": 2 * len(pairs) - len(sides),
        "opencc": version("opencc"),
        "inputs": inputs,
        "matches": matches,
        "longest_common_substring": {form: search.count_lengths() for form, search in searches.items()},
    }


def main() -> int:
    """Compare, write the report, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, default=Path("data/pairs"), help="folder of the pairs files")
    parser.add_argument("--homework", type=Path, required=True, help="folder of train.json and public_test.json")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of pairs-0*.tsv.xz")
    parser.add_argument("--output", type=Path, default=Path("docs/sample-check.json"), help="the report to write")
    arguments = parser.parse_args()
    try:
        pairs = read_pairs(arguments.pairs)
        if missing := find_missing_files(arguments.homework, arguments.corpus):
            raise ValueError("not found: " + ", ".join(missing))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    report = check_pairs(pairs, read_sources(arguments.homework, arguments.corpus))
    files = sorted(arguments.pairs.glob("*.tsv"))
    report["sample"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    arguments.output.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    match_count = sum(map(len, report["matches"].values()))
    for form, matches in report["matches"].items():
        for match in matches:
            print(f"{match['side']} occurs in {match['source']} ({form.replace('_', ' ')})")
    print(f"{report['sides_checked']} sides of {report['pairs']} pairs, {match_count} matches; {arguments.output}")
    return 1 if match_count else 0


if __name__ == "__main__":
    sys.exit(main())
