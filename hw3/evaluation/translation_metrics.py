"""Metrics of predictions besides perplexity, and those of copying the input, which every prediction should exceed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sacrebleu.metrics import BLEU, CHRF

from hw3.data.rows import Row
from hw3.data.templates import match_template
from hw3.runs.prediction_record import TranslationMetrics

# Title and meaning by metric, printed beside the values.
METRIC_DESCRIPTIONS = {
    "bleu": ("BLEU", "character 1- to 4-grams shared with the references, 0-100"),
    "chrf": ("chrF", "character 1- to 6-grams, recall counts twice, 0-100"),
    "exact_match": ("exact", "predictions equal to the reference"),
    "copy_rate": ("copied", "predictions equal to the sentence to translate"),
    "length_ratio": ("length", "characters of the predictions / characters of the references"),
    "unfinished": ("unfinished", "predictions cut because the model did not end them"),
}
METRICS_OF_COPYING = ("bleu", "chrf", "exact_match", "length_ratio")  # the others are always 1 and 0
_PERCENTAGES = ("exact_match", "copy_rate", "unfinished")


def compute_metrics(
    rows: Sequence[Row], outputs: Mapping[str, str], unfinished_ids: frozenset[str] = frozenset()
) -> dict[str, TranslationMetrics]:
    """Compute the metrics of all rows with a reference, and by direction where the template is known.

    A prefix that a template asks of its outputs (`答案：`) is not part of a translation. It is removed on both sides.

    Args:
        rows: the rows; those without a reference are left out.
        outputs: predicted text by row id.
        unfinished_ids: ids of predictions that were cut at their limit.

    Returns:
        Metrics by `all`, `m2c` and `c2m`; groups without rows are absent.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.output is None:
            continue
        matched = match_template(row.instruction)
        for name in ("all", *([matched[0].direction] if matched else [])):
            groups.setdefault(name, []).append(row)
    return {
        name: _compute_group(groups[name], outputs, unfinished_ids) for name in ("all", "m2c", "c2m") if name in groups
    }


def metrics_of_copying(rows: Sequence[Row]) -> dict[str, TranslationMetrics]:
    """Compute the metrics of returning the sentence unchanged. Rows without a known template are left out."""
    sentences = {row.id: matched[1] for row in rows if (matched := match_template(row.instruction))}
    return compute_metrics([row for row in rows if row.id in sentences], sentences)


def _compute_group(
    rows: Sequence[Row], outputs: Mapping[str, str], unfinished_ids: frozenset[str]
) -> TranslationMetrics:
    predictions, references, sentences = [], [], []
    for row in rows:
        matched = match_template(row.instruction)
        prefix, sentence = (matched[0].output_prefix, matched[1]) if matched else ("", row.instruction)
        predictions.append(outputs[row.id].removeprefix(prefix))
        references.append((row.output or "").removeprefix(prefix))
        sentences.append(sentence)
    count = len(rows)
    return TranslationMetrics(
        rows=count,
        bleu=BLEU(tokenize="char").corpus_score(predictions, [references]).score,
        chrf=CHRF().corpus_score(predictions, [references]).score,
        exact_match=sum(a == b for a, b in zip(predictions, references, strict=True)) / count,
        copy_rate=sum(a == b for a, b in zip(predictions, sentences, strict=True)) / count,
        length_ratio=sum(map(len, predictions)) / sum(map(len, references)),
        unfinished=sum(row.id in unfinished_ids for row in rows) / count,
    )


def format_metric(metric: str, value: float) -> str:
    """Format a metric for people."""
    if metric in _PERCENTAGES:
        return f"{value:.1%}"
    return f"{value:.2f}" if metric == "length_ratio" else f"{value:.1f}"


def print_metrics(groups: Mapping[str, TranslationMetrics], copying: Mapping[str, TranslationMetrics]) -> None:
    """Print the metrics, each beside that of copying the input, with its meaning."""
    titles = {"all": "all", "m2c": "to Classical", "c2m": "to modern"}
    print(f"{'':<11}" + "".join(f"{titles[name]:>13}{'copying':>9}" for name in groups))
    print(f"{'rows':<11}" + "".join(f"{metrics.rows:>13}{'':>9}" for metrics in groups.values()))
    for metric, (title, meaning) in METRIC_DESCRIPTIONS.items():
        cells = ""
        for name, metrics in groups.items():
            of_copying = ""
            if name in copying and metric in METRICS_OF_COPYING:
                of_copying = format_metric(metric, getattr(copying[name], metric))
            cells += f"{format_metric(metric, getattr(metrics, metric)):>13}{of_copying:>9}"
        print(f"{title:<11}{cells}  {meaning}")
