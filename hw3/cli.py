"""The command line: parse and call, decide nothing."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from hw3.common.errors import RunFailed, UserError
from hw3.common.gc_control import uncollected

FIRST_PROCESS_SPEAKS = 20  # seconds


def main(argv: list[str] | None = None) -> int:
    """Run one `hw3` command.

    Returns:
        0 done; 2 the recipe, the data or an argument is wrong; 130 or 143 stopped by a signal; 1 anything else.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes positionals in one piece only; overrides, and the file to predict, may also stand after options.
    if rest and not (hasattr(arguments, "overrides") and all(_may_follow(word, arguments) for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    # PEFT 0.21 asks transformers 5.23 by an old name; nothing a user can act on.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    try:
        return arguments.run_command(arguments)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # The first process of this machine says the same and ends, upon which the launcher ends this one.
            time.sleep(FIRST_PROCESS_SPEAKS)
        print(f"hw3: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        processes = os.environ.get("WORLD_SIZE", "1")
        which = f", process {os.environ['RANK']} of {processes}" if processes != "1" else ""
        print(f"hw3{which}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    except Exception:
        traceback.print_exc()
        return 1


def _may_follow(word: str, arguments: argparse.Namespace) -> bool:
    if word.startswith("-"):
        return word == "-" and arguments.run_command is _predict
    return "=" in word or arguments.run_command is _predict


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hw3", description="Fine-tune from a recipe; judge by output-only perplexity."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = _command(commands, "train", _train, "fine-tune, or resume an interrupted run")
    train.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    train.add_argument("--run", type=Path, metavar="DIR", help="default: outputs/<model>-<recipe>")
    train.add_argument("overrides", nargs="*", metavar="section.key=value", help="change the recipe for this run")

    evaluate = _command(commands, "eval", _eval, "output-only perplexity of the base and of every checkpoint")
    evaluate.add_argument("run", type=Path, metavar="RUN")
    evaluate.add_argument(
        "--recipe", type=Path, metavar="RECIPE.yaml", help="with --base-only: make the run folder from it"
    )
    evaluate.add_argument("--data", type=Path, metavar="FILE", help="rows to score; default: the recipe's data.eval")
    evaluate.add_argument(
        "--shots", type=int, nargs="+", default=[0], metavar="N", help="worked examples in the prompt"
    )
    evaluate.add_argument("--prompt", type=Path, nargs="+", default=[], metavar="FILE", help="prompts to compare")
    evaluate.add_argument("--base-only", action="store_true", help="leave the checkpoints out")
    evaluate.add_argument(
        "--adapter", type=Path, nargs="+", default=[], metavar="DIR", help="other PEFT adapters as well"
    )
    evaluate.add_argument(
        "--examples", choices=["prompt", "train"], default="prompt", help="worked examples: the prompt's, or drawn"
    )
    evaluate.add_argument("--against", metavar="NAME", help="compare with this one row by row; default: the best")
    evaluate.add_argument("--anyway", action="store_true", help="score checkpoints trained under another prompt")

    predict = _command(commands, "predict", _predict, "translations of a file's rows, of one text, or of lines")
    predict.add_argument("run", type=Path, metavar="RUN")
    predict.add_argument(
        "overrides",
        nargs="*",
        metavar="FILE | generation.key=value",
        help="rows, with or without outputs; default: the recipe's data.eval; - for lines of standard input",
    )
    predict.add_argument(
        "--checkpoint", default="best", metavar="NAME", help="best (default), last, base, checkpoint-100, or a path"
    )
    predict.add_argument("--shots", type=int, default=0, metavar="N", help="worked examples in the prompt")
    predict.add_argument("--output", type=Path, metavar="FILE", help="write the answers here as well")
    predict.add_argument("--text", metavar="TEXT", help="answer this at once; without a wording, a whole instruction")
    wording = predict.add_mutually_exclusive_group()
    wording.add_argument("--direction", choices=["m2c", "c2m"], help="the text's: modern to Classical, or back")
    wording.add_argument("--template", metavar="WORDING", help="a wording of your own, with {x} for the text")
    predict.add_argument("--anyway", action="store_true", help="use checkpoints trained under another prompt")

    compare = _command(commands, "compare", _compare, "answers of base, checkpoints and models side by side")
    compare.add_argument(
        "runs", nargs="+", metavar="RUN", help="all answers of a run, or RUN/base, RUN/checkpoint-100 for one"
    )
    compare.add_argument("--id", nargs="+", default=[], metavar="ID", help="these rows; default: by disagreement")
    compare.add_argument("--rows", type=int, default=10, metavar="N", help="how many rows; 0 for all")
    compare.add_argument("--data", type=Path, metavar="FILE", help="the rows, where several files were answered")

    report = _command(commands, "report", _report, "one HTML page and one Markdown file, from results files alone")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the main run first")
    report.add_argument("--out", type=Path, metavar="DIR", help="where to write; default: the first run's folder")

    check = _command(commands, "check", _check, "what a run would do: recipe, lengths, mask, memory, disk, time")
    check.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    check.add_argument("--mask", type=int, default=0, metavar="N", help="show N rows as the model is trained on them")
    check.add_argument("--run", type=Path, metavar="DIR", help="the run folder to go on in, if any")
    check.add_argument("--processes", type=int, default=1, metavar="N", help="processes that will share a step's rows")
    check.add_argument("--accelerate", type=Path, metavar="FILE.yaml", help="the accelerate file of their launch")
    check.add_argument("--no-probe", action="store_true", help="do not tell the run's time, for which steps are made")
    check.add_argument("overrides", nargs="*", metavar="section.key=value")

    pack = _command(commands, "pack", _pack, "the homework's submission folder, checked as its grader would")
    pack.add_argument("run", type=Path, metavar="RUN")
    pack.add_argument("--checkpoint", default="best", metavar="NAME", help="default: the best")
    pack.add_argument("--input", type=Path, metavar="FILE", help="rows to answer in prediction.json")
    pack.add_argument("--out", type=Path, metavar="DIR", help="the folder to make; default: RUN-pack")
    pack.add_argument("--for", dest="year", choices=["2024"], help="what that year's grader can read")
    pack.add_argument("--url", metavar="URL", help="for download.sh: address of the adapter's folder on the web")

    export = _command(commands, "export", _export, "a checkpoint as a whole model, the adapter merged into its base")
    export.add_argument("run", type=Path, metavar="RUN")
    export.add_argument("--checkpoint", default="best", metavar="NAME", help="default: the best")
    export.add_argument("--out", type=Path, metavar="DIR", help="the folder to make; default: RUN-export")

    _add_data_commands(commands)
    return parser


def _add_data_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    data = commands.add_parser("data", help="build and check files of rows", allow_abbrev=False)
    kinds = data.add_subparsers(required=True, metavar="build|rows|check")

    build = _command(kinds, "build", _data_build, "a homework-like set of rows from NiuTrans/Classical-Modern")
    build.add_argument(
        "--corpus",
        metavar="PATH",
        help="a clone, a folder of *.tsv.xz parts, an archive of a clone, or an archive's address",
    )
    build.add_argument("--sha256", metavar="HEX", help="the archive's checksum; another one is refused")
    build.add_argument("--out", type=Path, default=Path("data/homework"), metavar="FOLDER", help="default: %(default)s")
    build.add_argument(
        "--exclude",
        type=Path,
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE",
        help="rows whose sentences stay unseen",
    )
    build.add_argument(
        "--convert", choices=["s2tw", "hanziconv", "none"], default="s2tw", help="OpenCC, the homework's map, or none"
    )
    build.add_argument("--train", type=_count_or_all, default=10_000, metavar="N|all", help="default: 10000")
    for split in ("dev", "test", "private"):
        build.add_argument(f"--{split}", type=_count, default=250, metavar="N", help="default: 250")
    build.add_argument("--seed", type=int, default=0, metavar="N")

    rows = _command(kinds, "rows", _data_rows, "rows from a file or dataset that datasets.load_dataset reads")
    rows.add_argument("source", metavar="FILE|NAME", help="CSV, TSV, JSON, JSON Lines, Parquet, or a name on the hub")
    rows.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    rows.add_argument("--split", default="train", metavar="NAME", help="of a dataset on the hub; default: train")
    rows.add_argument("--config", metavar="NAME", help="of a dataset on the hub that has several")
    rows.add_argument(
        "--columns",
        nargs="+",
        required=True,
        metavar="FIELD=COLUMN",
        help="input= and output=, worded by --template; or classical= and modern=, worded as the homework; id= if any",
    )
    rows.add_argument(
        "--template", metavar="TEXT", help=r"instruction around {x}, the input; \n is a line end; default: {x}"
    )
    rows.add_argument("--seed", type=int, default=0, metavar="N", help="of the homework's wordings")

    check = _command(kinds, "check", _data_check, "describe files of rows: duplicates, leakage, lengths, characters")
    check.add_argument("files", type=Path, nargs="+", metavar="FILE")
    check.add_argument("--recipe", type=Path, metavar="RECIPE.yaml", help="count its tokens as well")
    check.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    check.add_argument("--picture", type=Path, metavar="FILE.png", help="draw lengths and directions")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"found {text}: a number of rows is needed")
    return int(text)


def _count_or_all(text: str) -> int | None:
    return None if text == "all" else _count(text)


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
) -> argparse.ArgumentParser:
    # No abbreviations: a typing error must not pass for an option.
    command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    command.set_defaults(run_command=run)
    return command


# PyTorch and its friends take seconds to import: each command imports what it needs.


def _train(arguments: argparse.Namespace) -> int:
    with uncollected():
        from hw3.common.distributed import failures_named
        from hw3.config.recipe import load_recipe
        from hw3.training.train import train

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    with failures_named(
        "less is needed with speed=lean, or with a smaller training.per_device_train_batch_size and as much more "
        "training.gradient_accumulation_steps; the run goes on from its last complete checkpoint"
    ):
        return train(recipe, arguments.run or Path("outputs") / recipe.name)


def _eval(arguments: argparse.Namespace) -> int:
    with uncollected():
        from hw3.common.distributed import failures_named, joined
        from hw3.evaluation.evaluate import evaluate_run

    smaller = f"a smaller evaluation.tokens_per_batch in {arguments.run}/recipe.yaml needs less; what is scored is kept"
    with failures_named(smaller), joined():
        return evaluate_run(
            arguments.run,
            recipe_path=arguments.recipe,
            data=arguments.data,
            shots=arguments.shots,
            prompts=arguments.prompt,
            base_only=arguments.base_only,
            adapters=arguments.adapter,
            examples=arguments.examples,
            against=arguments.against,
            anyway=arguments.anyway,
        )


def _predict(arguments: argparse.Namespace) -> int:
    with uncollected():
        from hw3.common.distributed import failures_named, joined, world_size
        from hw3.generation.interactive import answer_lines, lines_are_meant, one_file
        from hw3.generation.predict import predict_run

    file, overrides = one_file(arguments.overrides)
    options = {
        "overrides": overrides,
        "checkpoint": arguments.checkpoint,
        "shots": arguments.shots,
        "anyway": arguments.anyway,
    }
    wording = {"text": arguments.text, "direction": arguments.direction, "template": arguments.template}
    if lines_are_meant(file, arguments.output, **wording):
        if world_size() > 1:
            raise UserError("lines and --text are answered by one process; several share out the rows of a FILE")
        return answer_lines(arguments.run, **wording, **options)
    with failures_named("shorter answers, generation.max_new_tokens=N, need less; answers so far are kept"), joined():
        return predict_run(arguments.run, file, output=arguments.output, **options)


def _compare(arguments: argparse.Namespace) -> int:
    with uncollected():
        from hw3.generation.compare import compare_runs

    return compare_runs(arguments.runs, ids=arguments.id, data=arguments.data, most=arguments.rows)


def _report(arguments: argparse.Namespace) -> int:
    with uncollected():
        from hw3.report import write_report

    return write_report(arguments.runs, arguments.out)


def _check(arguments: argparse.Namespace) -> int:
    with uncollected():
        from hw3.config.recipe import load_recipe
        from hw3.training.preflight import check
        from hw3.training.sharding import sharded_as

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    run = arguments.run or Path("outputs") / recipe.name
    sharded = None if arguments.accelerate is None else sharded_as(arguments.accelerate)
    probed = not arguments.no_probe
    return check(recipe, run, mask_rows=arguments.mask, processes=arguments.processes, sharded=sharded, probed=probed)


def _pack(arguments: argparse.Namespace) -> int:
    with uncollected():
        from hw3.submission.pack import pack_run

    return pack_run(
        arguments.run,
        checkpoint=arguments.checkpoint,
        rows_to_answer=arguments.input,
        out=arguments.out,
        year=arguments.year,
        url=arguments.url,
    )


def _export(arguments: argparse.Namespace) -> int:
    with uncollected():
        from hw3.export.merge import export_run

    return export_run(arguments.run, checkpoint=arguments.checkpoint, out=arguments.out)


def _data_build(arguments: argparse.Namespace) -> int:
    from hw3.corpus.build import Settings, build
    from hw3.corpus.niutrans import HOW_TO_GET

    if arguments.corpus is None:
        raise UserError(*HOW_TO_GET)
    keys = ("convert", "train", "dev", "test", "private", "seed")
    settings = Settings(**{key: getattr(arguments, key) for key in keys})
    return build(arguments.corpus, arguments.out, settings, arguments.exclude, arguments.sha256)


def _data_rows(arguments: argparse.Namespace) -> int:
    from hw3.corpus.import_rows import write_own_rows

    return write_own_rows(
        arguments.source,
        arguments.out,
        columns=arguments.columns,
        template=arguments.template,
        config=arguments.config,
        split=arguments.split,
        seed=arguments.seed,
    )


def _data_check(arguments: argparse.Namespace) -> int:
    from hw3.corpus.audit import check_files

    return check_files(arguments.files, recipe=arguments.recipe, report=arguments.json, picture=arguments.picture)
