"""`hw3 data check`: what files of rows hold, and what in them would spoil a run or its score."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opencc import OpenCC

from hw3.common.atomic_io import write_json
from hw3.common.errors import UserError
from hw3.common.hashing import file_sha256
from hw3.corpus.build import sides
from hw3.corpus.dedup import INSIDE, NEARLY, SAME, Groups, Unseen, band_keys, join_near_duplicates
from hw3.corpus.filters import odd_characters
from hw3.corpus.normalize import script_of, skeletons
from hw3.data.rows import Row, read_rows
from hw3.data.templates import TEMPLATES, match

if TYPE_CHECKING:
    from hw3.data.tokenization import Encoder


SHORT = 4  # characters: the mean of row perplexities hangs on outputs as short as that
_SPELLING_ROWS = 5_000  # rows whose spelling is compared with OpenCC's, evenly from the file
_IDS_SHOWN = 5
# What the vocabularies of this project's recipes and their relatives call their special tokens.
_SPECIAL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|</?s>|<(?:bos|eos|pad|unk|mask)>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>"
)
_KINDS = {SAME: "same", INSIDE: "inside", NEARLY: "near"}


def check_files(
    files: Sequence[Path], *, recipe: Path | None = None, report: Path | None = None, picture: Path | None = None
) -> int:
    """Describe files of rows, compare them with one another, and name what is worth a look.

    Args:
        files: JSON lists or JSON Lines of `{id, instruction, output}`; rows without an output are described as well.
        recipe: its tokenizer, prompt and `max_length` are used to count tokens.
        report: where to write the figures as JSON.
        picture: where to draw lengths and directions.

    Returns:
        0.

    Raises:
        UserError: files cannot be read or hold bad rows, all of them named.
    """
    rows: dict[Path, list[Row]] = {}
    problems: list[str] = []
    for path in dict.fromkeys(files):
        try:
            rows[path] = read_rows(path, need_output=False)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    encoder, max_length, tokenizer_name = _encoder(recipe)
    # Files of one name in two folders are told apart by their paths.
    described = {str(path): describe(own, encoder, max_length) | _file(path) for path, own in rows.items()}
    between = [compare((str(a), rows[a]), (str(b), rows[b])) for a, b in combinations(rows, 2)]
    figures = {
        "schema": 1,
        "tokenizer": tokenizer_name,
        "max_length": max_length,
        "files": described,
        "between": between,
    }
    figures["notes"] = notes(figures)
    _print_table(figures)
    if report is not None:
        write_json(report, figures)
        print(f"{report}: the figures")
    if picture is not None:
        _draw({str(path): own for path, own in rows.items()}, described, picture)
        print(f"{picture}: lengths and directions")
    return 0


def _file(path: Path) -> dict[str, Any]:
    return {"sha256": file_sha256(path)}


def _encoder(recipe: Path | None) -> tuple[Encoder | None, int | None, str | None]:
    if recipe is None:
        return None, None, None
    # Seconds of imports that only tokens need.
    from hw3.config.recipe import load_recipe
    from hw3.data.tokenization import Encoder
    from hw3.modeling.loading import load_tokenizer

    loaded = load_recipe(recipe)
    name = loaded.model.pretrained_model_name_or_path
    return Encoder(load_tokenizer(loaded.model), loaded.prompt), loaded.data.max_length, name


def describe(rows: list[Row], encoder: Encoder | None = None, max_length: int | None = None) -> dict[str, Any]:
    """The figures of one file.

    Args:
        rows: the file's rows.
        encoder: counts tokens, if there is one.
        max_length: tokens that a row may have.

    Returns:
        Counts are of rows unless they say otherwise; lengths have `least`, `median`, `p95` and `most`.
    """
    with_output = [row for row in rows if row.output is not None]
    texts = [text for _, text, _ in _with_sides(with_output)]
    outputs = [output for _, _, output in _with_sides(with_output)]
    found = {
        "rows": len(rows),
        "without_output": len(rows) - len(with_output),
        "characters": {
            "instruction": _spread([len(row.instruction) for row in rows]),
            "text": _spread([len(text) for _, text, _ in _with_sides(rows)]),
            "output": _spread([len(row.output) for row in with_output]),
        },
        "duplicates": _duplicates(rows),
        "output_equals_input": {
            "exactly": _equal(texts, outputs),
            "but_for_script_and_punctuation": _equal(skeletons(texts), skeletons(outputs)),
        },
        "short_outputs": sum(len(output) <= SHORT for output in outputs),
        "special_tokens_in_text": _special(rows, _SPECIAL.findall),
        "odd_characters": _odd(rows),
        "scripts": _scripts(rows),
        "directions": _directions(rows),
    }
    if encoder is not None:
        found["tokens"] = _tokens(rows, encoder, max_length)
    return found


def _with_sides(rows: Sequence[Row]) -> list[tuple[Row, str, str]]:
    """Each row, the text that it asks to translate, and its translation (empty where there is none)."""
    return [(row, both[0], both[1] if len(both) > 1 else "") for row in rows for both in [sides(row)]]


def _equal(texts: Sequence[str], outputs: Sequence[str]) -> int:
    return sum(text == output for text, output in zip(texts, outputs, strict=True))


def _spread(lengths: list[int]) -> dict[str, int] | None:
    if not lengths:
        return None
    ordered = sorted(lengths)
    at = len(ordered) - 1
    return {"least": ordered[0], "median": ordered[at // 2], "p95": ordered[int(0.95 * at)], "most": ordered[-1]}


def _duplicates(rows: Sequence[Row]) -> dict[str, int]:
    """Rows beyond the first that say the same, and rows with a near duplicate elsewhere in the file.

    Texts are compared in one script and without punctuation.
    """
    texts = skeletons([text for _, text, _ in _with_sides(rows)])
    outputs = skeletons([output for _, _, output in _with_sides(rows)])
    pairs = Counter(zip(texts, outputs, strict=True))
    different = list(dict.fromkeys(texts))
    groups = Groups(len(different))
    join_near_duplicates(groups, different, band_keys(different))
    group_of = {text: groups.find(number) for number, text in enumerate(different)}
    sizes = Counter(group_of.values())
    return {
        "same_instruction": len(rows) - len({row.instruction for row in rows}),
        "same_text": len(texts) - len(different),
        "same_text_and_output": sum(count - 1 for (_, output), count in pairs.items() if output),
        "both_directions": sum((output, text) in pairs for text, output in pairs if output and text != output),
        "near_text": sum(sizes[group_of[text]] > 1 for text in texts),
    }


def _special(rows: Sequence[Row], find: Callable[[str], list[str]]) -> dict[str, int]:
    """How many rows hold each special token, spelled out, in their instruction or output."""
    return dict(Counter(token for row in rows for token in set(find(f"{row.instruction}\n{row.output or ''}"))))


def _odd(rows: Sequence[Row]) -> dict[str, Any]:
    found = [set(odd_characters(f"{text}{output}".replace("\n", ""))) for _, text, output in _with_sides(rows)]
    counts = Counter(character for characters in found for character in characters)
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:10]
    return {"rows": sum(map(bool, found)), "most": {f"U+{ord(c):04X}": count for c, count in most}}


def _scripts(rows: Sequence[Row]) -> dict[str, Any]:
    """Which script the rows are in, and how far their spelling is from OpenCC's `s2tw`."""
    kinds: Counter[str] = Counter()
    for _, text, output in _with_sides(rows):
        scripts = {script_of(character) for character in set(text + output)} - {None}
        kinds["mixed" if len(scripts) > 1 else next(iter(scripts), "either")] += 1
    sample = rows[:: max(1, -(-len(rows) // _SPELLING_ROWS))]
    text = "\n".join(text + output for _, text, output in _with_sides(sample))
    spelled = OpenCC("s2tw").convert(OpenCC("t2s").convert(text))
    other = sum(a != b for a, b in zip(text, spelled, strict=True)) if len(text) == len(spelled) else None
    return {
        **{kind: kinds[kind] for kind in ("traditional", "simplified", "mixed", "either")},
        "characters_s2tw_spells_otherwise": None if other is None else round(other / max(1, len(text)), 4),
    }


def _directions(rows: Sequence[Row]) -> dict[str, int]:
    found = [match(row.instruction) for row in rows]
    counts = Counter(match[0].direction if match else "other" for match in found)
    wordings = {match[0].text for match in found if match}
    return {**{name: counts[name] for name in ("m2c", "c2m", "other")}, "wordings": len(wordings)}


def _tokens(rows: Sequence[Row], encoder: Encoder, max_length: int | None) -> dict[str, Any]:
    encoded = [encoder.encode(row) for row in rows]
    unknown = encoder.tokenizer.unk_token_id
    special = [str(token) for token in encoder.tokenizer.added_tokens_decoder.values() if token.special]

    def find(text: str) -> list[str]:
        return [token for token in special if token in text]

    def count(ids: list[int]) -> int:
        return 0 if unknown is None else ids.count(unknown)

    return {
        "prompt": _spread([len(row.prompt_ids) for row in encoded]),
        "output": _spread([len(row.output_ids) for row in encoded if row.output_ids]),
        "row": _spread([len(row) for row in encoded]),
        "over_max_length": sum(len(row) > max_length for row in encoded) if max_length else 0,
        "unknown_in_prompts": sum(count(row.prompt_ids) for row in encoded),
        "unknown_in_outputs": sum(count(row.output_ids) for row in encoded),
        "special_tokens_in_text": _special(rows, find),
    }


def compare(one: tuple[str, list[Row]], other: tuple[str, list[Row]]) -> dict[str, Any]:
    """Leakage: rows of the smaller of two files with a side that the larger one has, on either side of its rows.

    Args:
        one, other: names and rows.

    Returns:
        `rows` of the smaller file by how their closest side is a copy (`same`, `inside`, `near`), `both_sides`, and a
        few `ids`.
    """
    (small_name, small), (large_name, large) = sorted((one, other), key=lambda file: len(file[1]))
    unseen = Unseen(skeletons([side for row in large for side in sides(row)]))
    texts, outputs = ([row[at] for row in _with_sides(small)] for at in (1, 2))
    kinds = []
    for column in (skeletons(texts), skeletons(outputs)):
        kinds.append(unseen.copies(column, band_keys(column)).tolist())
    closest = [min((kind for kind in pair if kind), default=0) for pair in zip(*kinds, strict=True)]
    return {
        "small": small_name,
        "large": large_name,
        "rows": len(small),
        **{name: closest.count(kind) for kind, name in _KINDS.items()},
        "both_sides": sum(all(pair) for pair in zip(*kinds, strict=True)),
        "ids": [row.id for row, kind in zip(small, closest, strict=True) if kind][:_IDS_SHOWN],
    }


def notes(figures: dict[str, Any]) -> list[str]:
    """What is worth a look, one line each."""
    found = []
    for name, file in figures["files"].items():
        rows, duplicates, scripts = file["rows"], file["duplicates"], file["scripts"]
        for count, words in (
            (file["without_output"], "have no output: rows to predict, not to train on or score"),
            (duplicates["same_text_and_output"], "say what an earlier row says"),
            (file["output_equals_input"]["but_for_script_and_punctuation"], "have the input for their output"),
            (file["short_outputs"], f"have outputs of at most {SHORT} characters; the mean perplexity hangs on such"),
            (sum(file["special_tokens_in_text"].values()), "have a special token spelled out; it stays text"),
            (scripts["mixed"], "mix simplified and traditional characters"),
            (
                file["odd_characters"]["rows"],
                "have odd characters, such as Latin letters, gap marks, bare radicals",
            ),
            (file["directions"]["other"], "follow none of the homework's wordings; their direction is unknown"),
            (file.get("tokens", {}).get("over_max_length", 0), f"are over {figures['max_length']} tokens"),
        ):
            if count:
                found.append(f"{name}: {count:,} of {rows:,} rows {words}")
        if scripts["simplified"] and scripts["traditional"]:
            found.append(
                f"{name}: {scripts['simplified']:,} rows are simplified and {scripts['traditional']:,} traditional"
            )
        spelled = scripts["characters_s2tw_spells_otherwise"]
        if spelled and spelled > 0.01 and scripts["traditional"] > scripts["simplified"]:
            found.append(
                f"{name}: {spelled:.1%} of the characters are not OpenCC's (s2tw): another conversion, such as the "
                "homework's map, made them"
            )
        directions = file["directions"]
        directed = directions["m2c"] + directions["c2m"]
        if directed and not 0.4 <= directions["m2c"] / directed <= 0.6:
            found.append(
                f"{name}: the directions are out of balance: {directions['m2c']:,} modern to Classical, "
                f"{directions['c2m']:,} Classical to modern"
            )
        if unknown := file.get("tokens", {}).get("unknown_in_outputs", 0):
            found.append(f"{name}: {unknown:,} output tokens are unknown to the tokenizer")
    for pair in figures["between"]:
        leaked = pair["same"] + pair["inside"] + pair["near"]
        if leaked:
            found.append(
                f"leakage: {leaked:,} of {pair['rows']:,} rows of {pair['small']} have a side that stands in "
                f"{pair['large']} ({pair['same']:,} the same, {pair['inside']:,} one inside the other, "
                f"{pair['near']:,} nearly; {pair['both_sides']:,} with both sides): {', '.join(pair['ids'])}"
                + (" ..." if leaked > len(pair["ids"]) else "")
            )
    return found


def _print_table(figures: dict[str, Any]) -> None:
    files = figures["files"]
    names = [Path(name).name if len({Path(n).name for n in files}) == len(files) else name for name in files]
    widths = [max(20, len(name)) for name in names]

    def line(label: str, cells: Sequence[str]) -> None:
        print(f"{label:<34}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))

    def spread(found: dict[str, int] | None) -> str:
        return "-" if found is None else " / ".join(f"{found[key]:,}" for key in ("least", "median", "p95", "most"))

    line("least / median / 95 % / most", names)
    line("rows", [f"{file['rows']:,}" for file in files.values()])
    line("  without output", [f"{file['without_output']:,}" for file in files.values()])
    for part in ("instruction", "text", "output"):
        line(
            f"characters: {part}",
            [spread(file["characters"][part]) for file in files.values()],
        )
    if figures["tokenizer"]:
        for part in ("prompt", "output", "row"):
            line(f"tokens: {part}", [spread(file["tokens"][part]) for file in files.values()])
        for key in ("over_max_length", "unknown_in_prompts", "unknown_in_outputs"):
            line(f"  {key.replace('_', ' ')}", [f"{file['tokens'][key]:,}" for file in files.values()])
        line(
            "  special tokens spelled out",
            [f"{sum(file['tokens']['special_tokens_in_text'].values()):,}" for file in files.values()],
        )
    for key, label in (
        ("same_instruction", "same instruction as another row"),
        ("same_text", "same text as another row"),
        ("same_text_and_output", "  and the same output"),
        ("both_directions", "pairs in both directions"),
        ("near_text", "near duplicates in the file"),
    ):
        line(label, [f"{file['duplicates'][key]:,}" for file in files.values()])
    line(
        "output = input, exactly / nearly",
        [" / ".join(f"{count:,}" for count in file["output_equals_input"].values()) for file in files.values()],
    )
    line(f"outputs of at most {SHORT} characters", [f"{file['short_outputs']:,}" for file in files.values()])
    line(
        "special tokens, common names",
        [f"{sum(file['special_tokens_in_text'].values()):,}" for file in files.values()],
    )
    line("rows with odd characters", [f"{file['odd_characters']['rows']:,}" for file in files.values()])
    line(
        "traditional / simplified / mixed",
        [
            " / ".join(f"{file['scripts'][kind]:,}" for kind in ("traditional", "simplified", "mixed"))
            for file in files.values()
        ],
    )
    line(
        "characters s2tw spells otherwise",
        [
            "-" if (share := file["scripts"]["characters_s2tw_spells_otherwise"]) is None else f"{share:.1%}"
            for file in files.values()
        ],
    )
    line(
        "modern to Classical / Cl. to modern",
        [f"{file['directions']['m2c']:,} / {file['directions']['c2m']:,}" for file in files.values()],
    )
    line(f"wordings, of {len(TEMPLATES)}", [f"{file['directions']['wordings']}" for file in files.values()])
    for pair in figures["between"]:
        if not any(pair[kind] for kind in _KINDS.values()):
            print(f"no row of {pair['small']} has a side that stands in {pair['large']}")
    print(*(f"! {note}" for note in figures["notes"]), sep="\n")


def _draw(rows: dict[str, list[Row]], described: dict[str, Any], picture: Path) -> None:
    """Lengths of inputs and outputs as shares of a file's rows, and directions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import PercentFormatter

    # Okabe and Ito's palette, told apart with any colour vision.
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000"]
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), dpi=150, layout="constrained")
    try:
        for at, (panel, title) in enumerate(zip(axes, ("texts to translate", "outputs"), strict=False)):
            lengths = [[len(row[at + 1]) for row in _with_sides(own) if row[at + 1]] for own in rows.values()]
            most = max((max(own) for own in lengths if own), default=1)
            edges = range(0, most + 10, max(1, most // 40))
            for number, own in enumerate(lengths):
                if own:
                    panel.hist(
                        own, edges, weights=[1 / len(own)] * len(own), histtype="step", color=colours[number % 8]
                    )
            panel.set_xlabel("characters")
            panel.set_title(f"length of {title}", fontsize=10)
            panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes[0].set_ylabel("share of the rows")
        names = list(rows)
        for number, name in enumerate(names):
            directions, start = described[name]["directions"], 0.0
            for key, shade in (("m2c", 1.0), ("c2m", 0.5), ("other", 0.15)):
                share = directions[key] / described[name]["rows"]
                axes[2].barh(number, share, left=start, color=colours[number % 8], alpha=shade)
                if share > 0.08:
                    axes[2].text(start + share / 2, number, key, ha="center", va="center", fontsize=8)
                start += share
        axes[2].set_yticks(range(len(names)), [Path(name).name for name in names], fontsize=8)
        for label, colour in zip(axes[2].get_yticklabels(), colours * len(names), strict=False):
            label.set_color(colour)
        axes[2].invert_yaxis()
        axes[2].xaxis.set_major_formatter(PercentFormatter(1.0))
        axes[2].set_title("direction", fontsize=10)
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, metadata={"Software": None})
    finally:
        plt.close(figure)
