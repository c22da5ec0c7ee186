"""Fill the generated tables of the documents from the files that commands wrote, so that no number is typed by hand.

A block of a document lies between `<!-- NAME -->` and `<!-- /NAME -->`. The tables in `docs/benchmarks/` are files of
their own. With `--check`, nothing is changed, and the exit status is 1 if a document differs from its sources.

    python tools/fill_readme.py
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from document_blocks import guide, inference, recipes, search, serving, study, training, versions
from document_blocks.sources import REPOSITORY, read_report

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from benchmark_report import format_table

BLOCKS: dict[str, Callable[[], str]] = {
    "recipe_keys": recipes.recipe_keys,
    "common_keys": recipes.common_keys,
    "reserved_keys": recipes.reserved_keys,
    "recipes": recipes.recipes,
    "costs": recipes.costs,
    "tiny": lambda: inference.scores("docs/tiny"),
    "homework": lambda: inference.scores("docs/homework"),
    "proper": lambda: inference.scores("docs/homework/proper"),
    "train_step": training.train_step,
    "scaling": training.scaling,
    "memory": training.memory,
    "small_gpus": training.small_gpus,
    "checksums": training.checksums,
    "multi_gpu_equivalence": training.multi_gpu_equivalence,
    "evaluation": inference.evaluation,
    "scoring_precision": inference.scoring_precision,
    "float16": inference.float16,
    "t4": training.t4_computed,
    "decoding": inference.decoding,
    "parallel_inference": inference.parallel_inference,
    "smollm2": lambda: inference.scores("docs/smollm2"),
    "smollm2_settings": guide.smollm2_settings,
    "versions": versions.packages,
    "version_tests": versions.tests,
    "gpu_tests": versions.gpu_tests,
    "step_kernels": lambda: format_table(read_report("step_kernels")).rstrip(),
    "gguf": serving.gguf,
    "search_tiny": search.search_tiny,
    "search_pruning": search.search_pruning,
    "search_speed": search.search_speed,
}
for language in ("en", "zh"):
    BLOCKS |= {
        f"scores_{language}": partial(guide.scores, "docs/tiny", language),
        f"gpus_{language}": partial(guide.gpus, language),
        f"times_{language}": partial(guide.times, language),
        f"published_{language}": partial(guide.published, language),
        f"reproducibility_{language}": partial(guide.reproducibility, language),
    }
    BLOCKS |= study.list_blocks(language)
DOCUMENTS = {
    "docs/recipe.md": ("recipes", "common_keys", "recipe_keys", "reserved_keys"),
    "README.md": ("scores_en", "gpus_en", "reproducibility_en"),
    "README.zh-TW.md": ("scores_zh", "gpus_zh", "reproducibility_zh"),
    "docs/course.md": ("times_en", "published_en"),
    "docs/course.zh-TW.md": ("times_zh", "published_zh"),
    "docs/benchmarks.md": (
        "costs",
        "train_step",
        "small_gpus",
        "checksums",
        "reproducibility_en",
        "scaling",
        "evaluation",
        "scoring_precision",
        "float16",
        "t4",
        "decoding",
        "smollm2",
        "homework",
    ),
    "docs/several-gpus.md": ("multi_gpu_equivalence", "scaling", "parallel_inference", "memory"),
    "docs/homework/README.md": ("homework", "proper"),
    "docs/versions.md": ("version_tests", "gpu_tests", "versions"),
    "docs/smollm2/README.md": ("smollm2", "smollm2_settings", "step_kernels"),
    "docs/serving.md": ("gguf",),
    "docs/study.md": (
        "smollm2",
        "tiny",
        "smollm2_settings",
        *(name for name in BLOCKS if re.fullmatch(r"study_\w+_en", name)),
    ),
    "docs/study.zh-TW.md": (
        "smollm2",
        "tiny",
        "smollm2_settings",
        *(name for name in BLOCKS if re.fullmatch(r"study_\w+_zh", name)),
    ),
    "docs/search.md": ("search_tiny", "search_pruning", "search_speed"),
}


def fill(text: str, names: tuple[str, ...]) -> str:
    """Return a document's text with new content in each of the named blocks.

    Raises:
        ValueError: The text has no such block.
    """
    for name in names:
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"the document has no block <!-- {name} --> ... <!-- /{name} -->")
        content = BLOCKS[name]()
        text = pattern.sub(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text)
    return text


def format_benchmark_tables() -> dict[Path, str]:
    """Return the table of each benchmark's report that has columns, by path."""
    reports = {path: read_report(path.stem) for path in sorted(REPOSITORY.glob("docs/benchmarks/*.json"))}
    return {path.with_suffix(".md"): format_table(report) for path, report in reports.items() if "columns" in report}


def main() -> int:
    """Fill the documents, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a document is out of date")
    arguments = parser.parse_args()
    texts = {
        REPOSITORY / document: fill((REPOSITORY / document).read_text(encoding="utf-8"), names)
        for document, names in DOCUMENTS.items()
    }
    outdated = []
    for path, text in (texts | format_benchmark_tables()).items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            outdated.append(path)
            if not arguments.check:
                path.write_text(text, encoding="utf-8")
    return int(arguments.check and bool(outdated))


if __name__ == "__main__":
    sys.exit(main())
