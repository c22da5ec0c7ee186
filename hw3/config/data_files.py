"""Read the data files that a recipe names."""

from __future__ import annotations

from pathlib import Path

from hw3.common.errors import ProblemCollector, UserError
from hw3.config.schema import DataSection
from hw3.config.yaml_loader import YamlDocument
from hw3.data.dev_split import split_dev_rows
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


def source_file(data: DataSection, key: DataFileKey) -> str:
    """Return the file that has the rows of a key: those of `dev` may be a part of the training file."""
    return data.train if key == "dev" and data.dev_fraction is not None else getattr(data, key)


def describe_rows(data: DataSection, key: DataFileKey) -> str:
    """Return the name of the rows of a key: their file, or what part of it they are."""
    if data.dev_fraction is None or key == "eval":
        return source_file(data, key)
    return f"{data.train} (dev)" if key == "dev" else f"{data.train} (without dev)"


def read_data_files(document: YamlDocument, data: DataSection, seed: int) -> dict[DataFileKey, list[Row]]:
    """Read the data files of a recipe; return their rows by key in the `data` section.

    With `data.dev_fraction`, the rows of `dev` are a part of the training file.

    Args:
        document: the recipe, for locations.
        data: its valid `data` section.
        seed: seed of the recipe, with which dev rows are chosen.

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
    rows_by_file = {key: rows for key, rows in read.items() if rows is not None}
    if data.dev_fraction is not None:
        rows_by_file["train"], rows_by_file["dev"] = split_dev_rows(rows_by_file["train"], data.dev_fraction, seed)
        if not rows_by_file["train"]:
            message = f"found {data.dev_fraction}, which leaves no training rows of {data.train}; set a smaller one"
            raise UserError(document.problem(("data", "dev_fraction"), message))
    return rows_by_file
