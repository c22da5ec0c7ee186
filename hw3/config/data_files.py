"""Read the data files that a recipe names."""

from __future__ import annotations

from pathlib import Path

from hw3.common.errors import ProblemCollector
from hw3.config.schema import DataSection
from hw3.config.yaml_loader import YamlDocument
from hw3.data.rows import DataFileKey, Row, read_rows

DATA_FILE_KEYS: tuple[DataFileKey, ...] = ("train", "eval", "dev")
COURSE_DATA = Path("data/homework")
WAYS_TO_GET_DATA = (
    "put the course's train.json and public_test.json into data/homework/",
    "build a similar set from a public corpus: make data CORPUS=... (docs/commands.md, Data)",
    "use the sample in this repository: make train MODEL={model} TRAIN=data/train.json EVAL=data/eval.json",
)


def list_data_files(data: DataSection) -> dict[DataFileKey, Path]:
    """Return the data files of a recipe, by key in the `data` section."""
    return {key: Path(name) for key in DATA_FILE_KEYS if (name := getattr(data, key)) is not None}


def read_data_files(document: YamlDocument, data: DataSection) -> dict[DataFileKey, list[Row]]:
    """Read the data files of a recipe; return their rows by key in the `data` section.

    Args:
        document: the recipe, for locations.
        data: its valid `data` section.

    Raises:
        UserError: lists every missing file and every invalid row, and three ways to get the course's files.
    """
    files = list_data_files(data)
    missing = {key: path for key, path in files.items() if not path.exists()}
    found = ProblemCollector(document.problem(("data", key), f"{path}: no such file") for key, path in missing.items())
    if any(path.parent == COURSE_DATA for path in missing.values()):
        model = Path(document.path).resolve().parent.name
        ways = [f"  {number}. {way.format(model=model)}" for number, way in enumerate(WAYS_TO_GET_DATA, 1)]
        found.problems += ["Three ways to get data:", *ways]
    read = {key: found.collect(read_rows, path) for key, path in files.items() if key not in missing}
    found.raise_problems()
    return {key: rows for key, rows in read.items() if rows is not None}
