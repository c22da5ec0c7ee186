"""Commands that work on data files: data build, data rows and data check."""

from __future__ import annotations

import argparse
from pathlib import Path

from hw3.cli.parsing import Commands, add_command
from hw3.common.errors import UserError


def add_build_command(commands: Commands) -> None:
    """Add the parser of `hw3 data build`."""
    build = add_command(
        commands, "build", run_build, "build data files like the homework's from NiuTrans/Classical-Modern"
    )
    build.add_argument(
        "--corpus",
        metavar="PATH",
        help="clone of the corpus, archive of a clone, URL of an archive, or folder of *.tsv.xz parts",
    )
    build.add_argument("--sha256", metavar="HEX", help="expected checksum of the archive")
    build.add_argument(
        "--output",
        type=Path,
        default=Path("data/homework"),
        metavar="DIR",
        help="folder to write; default: %(default)s",
    )
    build.add_argument(
        "--exclude",
        type=Path,
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files of rows whose sentences must not occur in the built files",
    )
    build.add_argument(
        "--convert",
        choices=["s2tw", "hanziconv", "none"],
        default="s2tw",
        help="conversion to traditional characters: OpenCC (default), the homework's, or none",
    )
    build.add_argument(
        "--train", type=_count_or_all, default=10_000, metavar="N|all", help="number of training rows; default: 10000"
    )
    for split in ("dev", "test", "private"):
        build.add_argument(
            f"--{split}", type=_count, default=250, metavar="N", help=f"number of {split} rows; default: 250"
        )
    build.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all sampling; default: 0")


def run_build(arguments: argparse.Namespace) -> int:
    """Run `hw3 data build`; return its exit status."""
    from hw3.corpus.build import BuildSettings, build_dataset
    from hw3.corpus.niutrans import CORPUS_HELP

    if arguments.corpus is None:
        raise UserError(*CORPUS_HELP)
    fields = ("convert", "train", "dev", "test", "private", "seed")
    settings = BuildSettings(**{field: getattr(arguments, field) for field in fields})
    return build_dataset(arguments.corpus, arguments.output, settings, arguments.exclude, arguments.sha256)


def add_rows_command(commands: Commands) -> None:
    """Add the parser of `hw3 data rows`."""
    rows = add_command(commands, "rows", run_rows, "import rows from a table in a file, or from a dataset on the hub")
    rows.add_argument(
        "source",
        metavar="FILE|NAME",
        help="CSV, TSV, JSON, JSON Lines or Parquet file, or name of a dataset on the hub",
    )
    rows.add_argument("--output", type=Path, required=True, metavar="FILE.json", help="file to write")
    rows.add_argument("--split", default="train", metavar="NAME", help="split of a dataset on the hub; default: train")
    rows.add_argument("--config", metavar="NAME", help="configuration of a dataset on the hub")
    rows.add_argument(
        "--columns",
        nargs="+",
        required=True,
        metavar="FIELD=COLUMN",
        help="input= and output=, formatted with --template; or classical= and modern=, formatted with the homework's "
        "templates; optionally id=",
    )
    rows.add_argument(
        "--template", metavar="TEXT", help=r"instruction, with {x} for the input and \n for a line end; default: {x}"
    )
    rows.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the sampled templates; default: 0")


def run_rows(arguments: argparse.Namespace) -> int:
    """Run `hw3 data rows`; return its exit status."""
    from hw3.corpus.import_rows import import_rows

    return import_rows(
        arguments.source,
        arguments.output,
        columns=arguments.columns,
        template=arguments.template,
        config=arguments.config,
        split=arguments.split,
        seed=arguments.seed,
    )


def add_check_command(commands: Commands) -> None:
    """Add the parser of `hw3 data check`."""
    check = add_command(
        commands, "check", run_check, "report duplicates, leakage, lengths and characters of data files"
    )
    check.add_argument("files", type=Path, nargs="+", metavar="FILE", help="files of rows")
    check.add_argument(
        "--recipe", type=Path, metavar="RECIPE.yaml", help="also report lengths in tokens of this recipe's model"
    )
    check.add_argument("--output", type=Path, metavar="FILE.json", help="write the report to this file")
    check.add_argument("--plot", type=Path, metavar="FILE.png", help="plot lengths and directions to this file")


def run_check(arguments: argparse.Namespace) -> int:
    """Run `hw3 data check`; return its exit status."""
    from hw3.corpus.audit import audit_files

    return audit_files(
        arguments.files, recipe_path=arguments.recipe, report_path=arguments.output, plot_path=arguments.plot
    )


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"found {text}; expected a number of rows")
    return int(text)


def _count_or_all(text: str) -> int | None:
    return None if text == "all" else _count(text)
