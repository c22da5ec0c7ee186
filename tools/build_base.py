"""Build the small base model in `data/tiny`: encode a corpus of sentence pairs, then train on one GPU.

    python tools/build_base.py encode --corpus NIUTRANS --output scratch/encoded   # CPU, needs OpenCC
    python tools/build_base.py train --encoded scratch/encoded --output data/tiny  # one GPU
    python tools/build_base.py build --corpus NIUTRANS --output data/tiny          # both
    python tools/build_base.py card --output data/tiny                             # only rewrite the model card

The corpus is a folder of `*.tsv.xz` files with lines `book<TAB>classical<TAB>modern` in simplified characters, such as
NiuTrans/Classical-Modern. One token is one character. The package `base_model` has the steps.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from base_model.encoding import encode_corpus
from base_model.model_card import write_model_card
from base_model.settings import parse_settings
from base_model.training import train_and_save

from hw3.common.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is 2 for wrong arguments or data."""
    options = build_parser().parse_args(arguments)
    try:
        if options.command == "encode":
            encode_corpus(options.corpus, options.output)
        elif options.command == "train":
            train_and_save(options.encoded, options.output, parse_settings(options.set))
        elif options.command == "build":
            settings = parse_settings(options.set)
            with tempfile.TemporaryDirectory() as encoded:
                encode_corpus(options.corpus, Path(encoded))
                train_and_save(Path(encoded), options.output, settings)
        else:
            write_model_card(options.output)
    except UserError as error:
        print(f"build_base: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("encode", "train", "build", "card"):
        sub = commands.add_parser(command)
        if command == "train":
            sub.add_argument("--encoded", type=Path, required=True, help="folder that encode wrote")
        elif command != "card":
            sub.add_argument("--corpus", type=Path, required=True, help="folder of *.tsv.xz: book, classical, modern")
        sub.add_argument("--output", type=Path, required=True, help="folder to write")
        if command in ("train", "build"):
            sub.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="change training settings")
    return parser


if __name__ == "__main__":
    sys.exit(main())
