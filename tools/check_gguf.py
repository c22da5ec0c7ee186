"""Compare GGUF files with the checkpoint that they were made from: tokens of the prompts, and scores of some rows.

    python tools/check_gguf.py outputs/smollm2-qlora-export/*.gguf --run outputs/smollm2-qlora

`hw3 export --format gguf` compares the file that it writes. This tool compares any other file as well, such as one that
llama-quantize made of it. It needs llama-cpp-python. The exit status is 1 if a token or a score differs too much. Types
that `hw3 export` does not write have no bound.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
from pathlib import Path
from typing import Any

from hw3.common.atomic_io import write_json
from hw3.common.disk import format_bytes
from hw3.common.errors import RunError, UserError
from hw3.data.rows import Row, read_rows
from hw3.data.templates import TEMPLATES
from hw3.data.tokenization import Encoder
from hw3.evaluation.perplexity import summarize
from hw3.evaluation.selection import ScoredCheckpoint, select_scored_checkpoint
from hw3.export.gguf_check import MAX_DIFFERENCE, check_tokens, compare_scores, is_llama_cpp_installed
from hw3.runs.run import Run

SENTENCE = "今日無雨，道不濘也。"


def main(arguments: list[str] | None = None) -> int:
    """Compare the files; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.gguf", help="files to compare")
    parser.add_argument("--run", type=Path, required=True, help="run folder, scored on its data.eval")
    parser.add_argument(
        "--checkpoint", default="best", metavar="NAME", help="checkpoint of the files; default: the best"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="also write the figures to this file")
    options = parser.parse_args(arguments)
    try:
        if not is_llama_cpp_installed():
            raise UserError("llama-cpp-python is not installed; run: pip install llama-cpp-python")
        if missing := [str(file) for file in options.files if not file.is_file()]:
            raise UserError(*(f"{file}: no such file" for file in missing))
        scored = select_scored_checkpoint(Run(options.run), options.checkpoint)
        encoder = Encoder(scored.run.load_tokenizer(scored.recipe), scored.recipe.prompt)
        entries = [compare_file(file, scored, encoder) for file in options.files]
    except (UserError, RunError) as error:
        print(f"check_gguf: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    if options.output is not None:
        versions = dict(scored.manifest.versions) | {"llama-cpp-python": entries[0].pop("version")}
        for entry in entries[1:]:
            del entry["version"]
        write_json(options.output, {"machine": {"cpu": platform.machine()}, "versions": versions, "rows": entries})
    return int(not all(entry["is_explained"] for entry in entries))


def compare_file(file: Path, scored: ScoredCheckpoint, encoder: Encoder) -> dict[str, Any]:
    """Compare one file, print the scores of its rows, and return the figures.

    Raises:
        RunError: a token differs, or llama.cpp failed.
    """
    wordings = [
        Row(id=f"wording {number}", instruction=template.render(SENTENCE), output=None)
        for number, template in enumerate(TEMPLATES, 1)
    ]
    rows = read_rows(scored.data_file)
    check_tokens(file, encoder, [*wordings, *rows])
    print(f"{file}: same tokens of {len(rows)} prompts and of one in each of {len(wordings)} wordings")
    match = re.search(r"-([a-z0-9_]+)\.gguf$", file.name)
    kind = match[1] if match and match[1] in MAX_DIFFERENCE else None
    comparison = compare_scores(file, scored, encoder, kind)
    print(comparison.describe())
    before, after = (summarize(scores).mean_perplexity for scores in (comparison.checkpoint, comparison.llama_cpp))
    return {
        "setting": kind or file.stem,
        "size": format_bytes(file.stat().st_size),
        "prompts": len(rows),
        "wordings": len(wordings),
        "scored_rows": len(comparison.checkpoint),
        "mean_perplexity_checkpoint": before,
        "mean_perplexity_llama_cpp": after,
        "largest_difference_nats": max(map(abs, comparison.differences)),
        "largest_difference_nats_per_token": max(comparison.per_token),
        "max_difference_nats_per_token": comparison.max_difference if kind else None,
        "is_explained": comparison.is_explained,
        "version": comparison.version,
    }


if __name__ == "__main__":
    sys.exit(main())
