"""Figures of answers beside perplexity, and of copying the input, which no answer should fall below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sacrebleu.metrics import BLEU, CHRF

from hw3.data.rows import Row
from hw3.data.templates import match

# A line each, as printed beside the figures.
EXPLAINED = {
    "bleu": ("BLEU", "runs of 1 to 4 characters shared with the references, 0-100"),
    "chrf": ("chrF", "runs of 1 to 6 characters, missing ones count twice, 0-100"),
    "exact_match": ("exact", "answers equal to the reference"),
    "copy_rate": ("copied", "answers equal to the sentence to translate"),
    "length_ratio": ("length", "characters of the answers over characters of the references"),
    "unfinished": ("unfinished", "answers cut because the model did not end them"),
}
_OF_COPIES = ("bleu", "chrf", "exact_match", "length_ratio")  # the others are 1 and 0
_SHARES = ("exact_match", "copy_rate", "unfinished")


@dataclass(frozen=True, slots=True)
class Figures:
    """Figures of a group of rows.

    Attributes:
        rows: how many.
        bleu: character BLEU-4 of the group as one corpus, 0-100 (Papineni et al., 2002; sacrebleu, `tokenize="char"`,
            since a Chinese text has no words to split by; exponential smoothing).
        chrf: chrF2 of the group as one corpus, 0-100 (Popovic, 2015; sacrebleu).
        exact_match: share of answers equal to the reference.
        copy_rate: share of answers equal to the sentence to translate.
        length_ratio: characters of the answers over characters of the references.
        unfinished: share of answers cut at `max_new_tokens`.
    """

    rows: int
    bleu: float
    chrf: float
    exact_match: float
    copy_rate: float
    length_ratio: float
    unfinished: float


def quality(
    rows: Sequence[Row], answers: Mapping[str, str], unfinished: frozenset[str] = frozenset()
) -> dict[str, dict[str, Any]]:
    """Figures of all rows that have a reference, and by direction where the templates tell it.

    An opening that a template asks of its answers (`答案：`) is no part of a translation: it is taken off both sides.

    Args:
        rows: with references; rows without one are left out.
        answers: text by row id.
        unfinished: ids of answers that were cut.

    Returns:
        Figures by `all`, `m2c` and `c2m`; groups without rows are absent.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.output is None:
            continue
        found = match(row.instruction)
        for name in ("all", *([found[0].direction] if found else [])):
            groups.setdefault(name, []).append(row)
    return {
        name: asdict(_figures(groups[name], answers, unfinished)) for name in ("all", "m2c", "c2m") if name in groups
    }


def copy_input(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """The same figures for giving the sentence back as it is; rows that follow no template have none to give."""
    sentences = {row.id: found[1] for row in rows if (found := match(row.instruction))}
    return quality([row for row in rows if row.id in sentences], sentences)


def _figures(rows: Sequence[Row], answers: Mapping[str, str], unfinished: frozenset[str]) -> Figures:
    given, wanted, sentences = [], [], []
    for row in rows:
        found = match(row.instruction)
        prefix, sentence = (found[0].answer_prefix, found[1]) if found else ("", row.instruction)
        given.append(answers[row.id].removeprefix(prefix))
        wanted.append((row.output or "").removeprefix(prefix))
        sentences.append(sentence)
    count = len(rows)
    return Figures(
        rows=count,
        bleu=BLEU(tokenize="char").corpus_score(given, [wanted]).score,
        chrf=CHRF().corpus_score(given, [wanted]).score,
        exact_match=sum(a == b for a, b in zip(given, wanted, strict=True)) / count,
        copy_rate=sum(a == b for a, b in zip(given, sentences, strict=True)) / count,
        length_ratio=sum(map(len, given)) / sum(map(len, wanted)),
        unfinished=sum(row.id in unfinished for row in rows) / count,
    )


def shown(figure: str, value: float) -> str:
    """A figure for people."""
    if figure in _SHARES:
        return f"{value:.1%}"
    return f"{value:.2f}" if figure == "length_ratio" else f"{value:.1f}"


def print_quality(groups: Mapping[str, Mapping[str, Any]], copied: Mapping[str, Mapping[str, Any]]) -> None:
    """The figures, each beside that of copying the input and with what it means."""
    titles = {"all": "all", "m2c": "to Classical", "c2m": "to modern"}
    print(f"{'':<11}" + "".join(f"{titles[name]:>13}{'copying':>9}" for name in groups))
    print(f"{'rows':<11}" + "".join(f"{figures['rows']:>13}{'':>9}" for figures in groups.values()))
    for figure, (title, meaning) in EXPLAINED.items():
        cells = ""
        for name, figures in groups.items():
            beside = shown(figure, copied[name][figure]) if name in copied and figure in _OF_COPIES else ""
            cells += f"{shown(figure, figures[figure]):>13}{beside:>9}"
        print(f"{title:<11}{cells}  {meaning}")
