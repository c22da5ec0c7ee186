"""Commands that work on runs: train, eval, predict, compare, report, check, pack and export.

Importing PyTorch and the Hugging Face libraries takes seconds, so each command imports only what it needs, after the
first round of checks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hw3.cli.parsing import Commands, add_command, add_overrides
from hw3.common.errors import UserError
from hw3.common.gc_control import gc_paused

_RUN_HELP = (
    "run folder; default: outputs/FOLDER-FILE, for example outputs/tiny-qlora for the recipe recipes/tiny/qlora.yaml"
)
_ALLOW_MISMATCH_HELP = "use checkpoints that were trained with another prompt, base model or quantization"


def add_train_command(commands: Commands) -> None:
    """Add the parser of `hw3 train`."""
    train = add_command(
        commands,
        "train",
        run_train,
        "fine-tune a model; to resume an interrupted run, run the same command again",
    )
    train.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="recipe of the run")
    train.add_argument("--run", type=Path, metavar="DIR", help=_RUN_HELP)
    train.add_argument(
        "--break-lock",
        action="store_true",
        help="train although another process seems to write to the run folder; only if you know that it has ended",
    )
    add_overrides(train)


def run_train(arguments: argparse.Namespace) -> int:
    """Run `hw3 train`; return its exit status."""
    with gc_paused():
        from hw3.cli.first_checks import check_training_arguments

        recipe, run_dir = check_training_arguments(arguments.recipe, arguments.overrides, arguments.run)

        from hw3.common.distributed import explain_runtime_errors
        from hw3.evaluation.during_training import build_checkpoint_scorer
        from hw3.runs.run import Run
        from hw3.training.train import train

    score_checkpoint = build_checkpoint_scorer(Run(run_dir)) if recipe.evaluation.during_training else None
    with explain_runtime_errors(
        "to use less memory, set speed=lean, or lower training.per_device_train_batch_size and raise "
        "training.gradient_accumulation_steps by the same factor; the run resumes from its last complete checkpoint"
    ):
        return train(recipe, run_dir, break_lock=arguments.break_lock, score_checkpoint=score_checkpoint)


def add_eval_command(commands: Commands) -> None:
    """Add the parser of `hw3 eval`."""
    evaluate = add_command(
        commands, "eval", run_eval, "compute the output-only perplexity of the base model and of every checkpoint"
    )
    evaluate.add_argument("run", type=Path, metavar="RUN", help="run folder")
    evaluate.add_argument(
        "--recipe", type=Path, metavar="RECIPE.yaml", help="with --base-only: create the run folder from this recipe"
    )
    evaluate.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="rows to score; default: the recipe's dev rows, if it has them, and data.eval",
    )
    evaluate.add_argument(
        "--shots", type=int, nargs="+", default=[0], metavar="N", help="numbers of few-shot examples; default: 0"
    )
    evaluate.add_argument(
        "--prompt",
        nargs="+",
        default=[],
        metavar="NAME",
        help="rank other prompts beside the recipe's: names in recipes/prompts/, all of them (all), or files",
    )
    models = evaluate.add_mutually_exclusive_group()
    models.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="score only the base model (base), or also one checkpoint: best, last, checkpoint-100, or a path; "
        "default: the base model and every complete checkpoint",
    )
    models.add_argument(
        "--base-only", action="store_const", const="base", dest="checkpoint", help="the same as --checkpoint base"
    )
    evaluate.add_argument(
        "--adapter", type=Path, nargs="+", default=[], metavar="DIR", help="score other PEFT adapters as well"
    )
    evaluate.add_argument(
        "--examples",
        choices=["prompt", "train"],
        default="prompt",
        help="take few-shot examples from the prompt (default), or sample them from the training file",
    )
    evaluate.add_argument(
        "--baseline",
        metavar="NAME",
        help="compare the other entries with this one row by row; NAME as in the table: base, base+4, checkpoint-100, "
        "or with --prompt study, study+4; default: the best",
    )
    evaluate.add_argument("--allow-mismatch", action="store_true", help=_ALLOW_MISMATCH_HELP)


def run_eval(arguments: argparse.Namespace) -> int:
    """Run `hw3 eval`; return its exit status."""
    with gc_paused():
        from hw3.cli.first_checks import check_eval_arguments

        check_eval_arguments(arguments)

        from hw3.common.distributed import explain_runtime_errors, process_group
        from hw3.evaluation.evaluate import evaluate_run
        from hw3.runs.run import Run

    with (
        explain_runtime_errors(
            f"to use less memory, lower evaluation.tokens_per_batch in {arguments.run}/recipe.yaml; finished scores "
            "are saved"
        ),
        process_group(),
    ):
        return evaluate_run(
            Run(arguments.run),
            recipe_path=arguments.recipe,
            data_file=arguments.data,
            shots=arguments.shots,
            prompts=arguments.prompt,
            checkpoint=arguments.checkpoint,
            adapters=arguments.adapter,
            examples_source=arguments.examples,
            baseline=arguments.baseline,
            allow_mismatch=arguments.allow_mismatch,
        )


def add_verify_command(commands: Commands) -> None:
    """Add the parser of `hw3 verify`."""
    verify = add_command(
        commands,
        "verify",
        run_verify,
        "compare the checksums of a run's files, compute its figures again, and score one checkpoint again",
    )
    verify.add_argument("run", type=Path, metavar="RUN", help="run folder")


def run_verify(arguments: argparse.Namespace) -> int:
    """Run `hw3 verify`; return its exit status."""
    with gc_paused():
        from hw3.runs.run import Run

        run = Run(arguments.run)
        run.load_recipe()

        from hw3.evaluation.verify import verify_run

    return verify_run(run)


def add_predict_command(commands: Commands) -> None:
    """Add the parser of `hw3 predict`."""
    predict = add_command(
        commands, "predict", run_predict, "translate the rows of a file, one text, or lines that you type"
    )
    predict.add_argument("run", type=Path, metavar="RUN", help="run folder")
    predict.add_argument(
        "overrides",
        nargs="*",
        metavar="FILE | generation.key=value",
        help="rows with or without outputs, default: the recipe's data.eval; - reads lines from standard input",
    )
    predict.add_argument(
        "--checkpoint", default="best", metavar="NAME", help="best (default), last, base, checkpoint-100, or a path"
    )
    predict.add_argument("--shots", type=int, default=0, metavar="N", help="number of few-shot examples; default: 0")
    predict.add_argument("--output", type=Path, metavar="FILE", help="also copy the predictions to this file")
    predict.add_argument(
        "--text", metavar="TEXT", help="translate this text; without --direction or --template, a complete instruction"
    )
    wording = predict.add_mutually_exclusive_group()
    wording.add_argument(
        "--direction", choices=["m2c", "c2m"], help="translate modern to Classical Chinese, or Classical to modern"
    )
    wording.add_argument("--template", metavar="TEMPLATE", help="your own instruction, with {x} in place of the text")
    predict.add_argument("--allow-mismatch", action="store_true", help=_ALLOW_MISMATCH_HELP)


def run_predict(arguments: argparse.Namespace) -> int:
    """Run `hw3 predict`; return its exit status."""
    with gc_paused():
        from hw3.cli.first_checks import check_predict_arguments
        from hw3.generation.interactive import is_interactive, predict_lines, split_input_and_overrides

        input_file, overrides = split_input_and_overrides(arguments.overrides)
        wording = {"text": arguments.text, "direction": arguments.direction, "template": arguments.template}
        reads_lines = is_interactive(input_file, arguments.output, **wording)
        check_predict_arguments(arguments, input_file, overrides)

        from hw3.common.distributed import explain_runtime_errors, get_world_size, process_group
        from hw3.generation.predict import predict_run
        from hw3.runs.run import Run

    options = {
        "overrides": overrides,
        "checkpoint": arguments.checkpoint,
        "shots": arguments.shots,
        "allow_mismatch": arguments.allow_mismatch,
    }
    if reads_lines:
        if get_world_size() > 1:
            raise UserError("typed lines and --text need a single process; only the rows of a FILE can be shared")
        return predict_lines(Run(arguments.run), **wording, **options)
    out_of_memory_advice = "to use less memory, lower generation.max_new_tokens; finished predictions are saved"
    with explain_runtime_errors(out_of_memory_advice), process_group():
        return predict_run(Run(arguments.run), input_file, output=arguments.output, **options)


def add_compare_command(commands: Commands) -> None:
    """Add the parser of `hw3 compare`."""
    compare = add_command(
        commands, "compare", run_compare, "print predictions of the base model, checkpoints and runs side by side"
    )
    compare.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folder, or only one set of its predictions: RUN/base, RUN/checkpoint-100",
    )
    compare.add_argument(
        "--id", nargs="+", default=[], metavar="ID", help="print these rows; default: those that differ most"
    )
    compare.add_argument("--rows", type=int, default=10, metavar="N", help="number of rows, 0 for all; default: 10")
    compare.add_argument(
        "--data", type=Path, metavar="FILE", help="data file, if the runs have predictions for several"
    )


def run_compare(arguments: argparse.Namespace) -> int:
    """Run `hw3 compare`; return its exit status."""
    with gc_paused():
        from hw3.generation.compare import compare_runs

    return compare_runs(arguments.runs, ids=arguments.id, data_file=arguments.data, max_rows=arguments.rows)


def add_report_command(commands: Commands) -> None:
    """Add the parser of `hw3 report`."""
    report = add_command(
        commands, "report", run_report, "write an HTML page and a Markdown file from the result files of runs"
    )
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders, the main run first")
    report.add_argument("--output", type=Path, metavar="DIR", help="folder to write to; default: the first run folder")
    report.add_argument("--title", metavar="TEXT", help="title of the page; default: the names of the runs")
    report.add_argument("--author", metavar="NAME", help="author of the report")
    report.add_argument("--student-id", metavar="NUMBER", help="student number of the author")
    report.add_argument("--lang", choices=["en", "zh-TW"], default="en", help="language of the page; default: en")


def run_report(arguments: argparse.Namespace) -> int:
    """Run `hw3 report`; return its exit status."""
    with gc_paused():
        from hw3.report import write_report
        from hw3.runs.run import Run

    return write_report(
        [Run(path) for path in arguments.runs],
        arguments.output,
        title=arguments.title,
        author=arguments.author,
        student_id=arguments.student_id,
        language=arguments.lang,
    )


def add_check_command(commands: Commands) -> None:
    """Add the parser of `hw3 check`."""
    check = add_command(
        commands, "check", run_check, "show what a run would do: recipe, lengths, masks, memory, disk space, time"
    )
    check.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="recipe of the run")
    check.add_argument(
        "--show-masks", type=int, default=0, metavar="N", help="print the tokens and loss masks of N training rows"
    )
    check.add_argument("--run", type=Path, metavar="DIR", help=_RUN_HELP)
    check.add_argument(
        "--processes", type=int, default=1, metavar="N", help="number of processes that share the rows of a step"
    )
    check.add_argument("--accelerate", type=Path, metavar="FILE.yaml", help="accelerate configuration of the launch")
    check.add_argument(
        "--no-time-estimate", action="store_true", help="skip the time estimate, which runs a few training steps"
    )
    add_overrides(check)


def run_check(arguments: argparse.Namespace) -> int:
    """Run `hw3 check`; return its exit status."""
    with gc_paused():
        from hw3.cli.first_checks import check_training_arguments

        recipe, run_dir = check_training_arguments(
            arguments.recipe,
            arguments.overrides,
            arguments.run,
            processes=arguments.processes,
            accelerate=arguments.accelerate,
        )

        from hw3.training.preflight import check_recipe
        from hw3.training.sharding import sharding_from_file

    return check_recipe(
        recipe,
        run_dir,
        show_masks=arguments.show_masks,
        processes=arguments.processes,
        sharding=None if arguments.accelerate is None else sharding_from_file(arguments.accelerate),
        estimate_time=not arguments.no_time_estimate,
    )


def add_pack_command(commands: Commands) -> None:
    """Add the parser of `hw3 pack`."""
    pack = add_command(
        commands, "pack", run_pack, "build the homework's submission folder and verify it as the grader would"
    )
    pack.add_argument("run", type=Path, metavar="RUN", help="run folder")
    pack.add_argument("--checkpoint", default="best", metavar="NAME", help="checkpoint to submit; default: the best")
    pack.add_argument("--input", type=Path, metavar="FILE", help="rows to predict in prediction.json")
    pack.add_argument("--output", type=Path, metavar="DIR", help="folder to create; default: RUN-pack")
    pack.add_argument(
        "--grader-year", choices=["2024"], help="write only adapter settings that this year's grader can read"
    )
    pack.add_argument("--url", metavar="URL", help="web address of the adapter's folder, for download.sh")


def run_pack(arguments: argparse.Namespace) -> int:
    """Run `hw3 pack`; return its exit status."""
    with gc_paused():
        from hw3.cli.first_checks import check_pack_arguments

        check_pack_arguments(arguments)

        from hw3.runs.run import Run
        from hw3.submission.pack import pack_run

    return pack_run(
        Run(arguments.run),
        checkpoint=arguments.checkpoint,
        input_file=arguments.input,
        output=arguments.output,
        grader_year=arguments.grader_year,
        url=arguments.url,
    )


def add_export_command(commands: Commands) -> None:
    """Add the parser of `hw3 export`."""
    export = add_command(
        commands, "export", run_export, "merge a checkpoint's adapter into its base model and write a complete model"
    )
    export.add_argument("run", type=Path, metavar="RUN", help="run folder")
    export.add_argument("--checkpoint", default="best", metavar="NAME", help="checkpoint to merge; default: the best")
    export.add_argument("--output", type=Path, metavar="DIR", help="folder to create; default: RUN-export")
    export.add_argument("--format", choices=["gguf"], help="also write a file for llama.cpp and Ollama")
    export.add_argument(
        "--quant", choices=["f32", "f16", "bf16", "q8_0"], help="with --format: type of its weights; default: f16"
    )
    export.add_argument(
        "--llama-cpp",
        type=Path,
        metavar="DIR",
        help="with --format: a clone of llama.cpp, or an unpacked source package of llama-cpp-python",
    )


def run_export(arguments: argparse.Namespace) -> int:
    """Run `hw3 export`; return its exit status."""
    with gc_paused():
        from hw3.cli.first_checks import check_export_arguments

        gguf_options = check_export_arguments(arguments)

        from hw3.export.merge import export_run
        from hw3.runs.run import Run

    return export_run(
        Run(arguments.run), checkpoint=arguments.checkpoint, output=arguments.output, gguf_options=gguf_options
    )
