"""Checks that the sample is original: no side of 8 or more characters stands in the given collections.

    python tools/check_sample.py --homework DIR --corpus DIR

The homework's DIR holds train.json and public_test.json, rows of {id, instruction, output}; the corpus's DIR
holds NiuTrans/Classical-Modern as pairs-0*.tsv.xz, lines of book, Classical, modern. Everything is compared
in simplified characters, as substrings: once with punctuation, once without punctuation and white space.
Writes docs/sample-check.json, which names our lines and the source but quotes nothing, and ends with status 1
if there is a match. It needs the packages opencc and pyahocorasick.
"""

import argparse
import hashlib
import json
import lzma
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import ahocorasick
from build_sample import Pair, read_pairs

from hw3.corpus.normalize import fold, without_punctuation

SHORTEST_SIDE = 8
# Common substrings are found by their first GRAM characters; what is shorter counts as "shorter".
GRAM = 8


class Source(NamedTuple):
    """One file to compare with: its texts, folded, one a line."""

    name: str
    sha256: str
    pairs: int
    text: str


def read_sources(homework: Path, corpus: Path) -> Iterator[Source]:
    """The files of both folders, one at a time: a corpus part takes some hundred MB of memory."""
    for name in ("train.json", "public_test.json"):
        data = (homework / name).read_bytes()
        rows = json.loads(data)
        text = "\n".join(row[key] for row in rows for key in ("instruction", "output"))
        yield Source(f"homework/{name}", hashlib.sha256(data).hexdigest(), len(rows), fold(text))
    for path in corpus_parts(corpus):
        data = path.read_bytes()
        lines = lzma.decompress(data).decode().removesuffix("\n").split("\n")
        text = "\n".join(side for line in lines for side in line.split("\t")[1:])
        yield Source(f"corpus/{path.name}", hashlib.sha256(data).hexdigest(), len(lines), fold(text))


def corpus_parts(corpus: Path) -> list[Path]:
    return sorted(corpus.glob("pairs-0*.tsv.xz"))


def missing(homework: Path, corpus: Path) -> list[str]:
    """The files that a comparison needs and that are not there."""
    absent = [str(homework / n) for n in ("train.json", "public_test.json") if not (homework / n).is_file()]
    return absent + ([] if corpus_parts(corpus) else [str(corpus / "pairs-0*.tsv.xz")])


class Sides:
    """Sides to look for in texts, in one form; ``longest`` is each one's longest common substring so far."""

    def __init__(self, sides: dict[str, str]) -> None:
        self.sides = sides
        self.longest = dict.fromkeys(sides, 0)
        places: dict[str, list[tuple[str, int]]] = {}
        for name, side in sides.items():
            # A side that is shorter than a gram once its punctuation is gone is looked for as a whole.
            for start in range(max(len(side) - GRAM, 0) + 1):
                places.setdefault(side[start : start + GRAM], []).append((name, start))
        self.grams = ahocorasick.Automaton()
        for gram, where in places.items():
            self.grams.add_word(gram, (len(gram), where))
        self.grams.make_automaton()

    def search(self, text: str) -> list[str]:
        """The names of the sides that stand in ``text``."""
        found = set()
        for end, (length, places) in self.grams.iter(text):
            at = end + 1 - length
            for name, start in places:
                side = self.sides[name]
                common = length
                while start + common < len(side) and text[at + common : at + common + 1] == side[start + common]:
                    common += 1
                self.longest[name] = max(self.longest[name], common)
                if common == len(side):
                    found.add(name)
        return sorted(found)

    def lengths(self) -> dict[str, int]:
        """How many sides have which length of longest common substring, the shortest first."""
        counts: dict[str, int] = {}
        for length in sorted(self.longest.values()):
            key = str(length) if length >= GRAM else "shorter"
            counts[key] = counts.get(key, 0) + 1
        return counts


def check(pairs: list[Pair], sources: Iterator[Source]) -> dict:
    """The report: what was compared, and every match as our line and side and the source's file name."""
    sides = {
        f"{pair.name} {column}": fold(side)
        for pair in pairs
        for column, side in zip(("classical", "modern"), pair.sides, strict=True)
        if len(side) >= SHORTEST_SIDE
    }
    forms = {
        "with_punctuation": Sides(sides),
        "without_punctuation": Sides({name: without_punctuation(side) for name, side in sides.items()}),
    }
    matches: dict[str, list[dict[str, str]]] = {form: [] for form in forms}
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
        for form, text in (
            ("with_punctuation", source.text),
            ("without_punctuation", without_punctuation(source.text)),
        ):
            matches[form] += [{"side": name, "source": source.name} for name in forms[form].search(text)]
    return {
        "pairs": len(pairs),
        "sides_checked": len(sides),
        "sides_shorter_than_8_not_checked": 2 * len(pairs) - len(sides),
        "opencc": version("opencc"),
        "inputs": inputs,
        "matches": matches,
        "longest_common_substring": {form: searched.lengths() for form, searched in forms.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, default=Path("data/pairs"), help="folder of the pairs files")
    parser.add_argument("--homework", type=Path, required=True, help="folder of train.json and public_test.json")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of pairs-0*.tsv.xz")
    parser.add_argument("--out", type=Path, default=Path("docs/sample-check.json"), help="where the report goes")
    arguments = parser.parse_args()
    try:
        pairs = read_pairs(arguments.pairs)
        if absent := missing(arguments.homework, arguments.corpus):
            raise ValueError("not found: " + ", ".join(absent))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    report = check(pairs, read_sources(arguments.homework, arguments.corpus))
    files = sorted(arguments.pairs.glob("*.tsv"))
    report["sample"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    arguments.out.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    found = sum(map(len, report["matches"].values()))
    for form, matches in report["matches"].items():
        for match in matches:
            print(f"{match['side']} stands in {match['source']} ({form.replace('_', ' ')})")
    print(f"{report['sides_checked']} sides of {report['pairs']} pairs, {found} matches; {arguments.out}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
