"""Check the data files that a recipe names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hw3.common.errors import UserError
from hw3.config.schema import DataSection
from hw3.config.yaml_loader import YamlDocument
from hw3.data.rows import DataFileKey, read_rows

DATA_FILE_KEYS: tuple[DataFileKey, ...] = ("train", "eval", "dev")
COURSE_DATA = Path("data/homework")
WAYS_TO_GET_DATA = (
    "put the course's train.json and public_test.json into data/homework/",
    "build a similar set from a public corpus: make data CORPUS=... (README, Data)",
    "use the sample in this repository: make train MODEL={model} TRAIN=data/train.json EVAL=data/eval.json",
)


def list_data_files(data: DataSection) -> dict[DataFileKey, Path]:
    """Return the data files of a recipe, by key in the `data` section."""
    return {key: Path(name) for key in DATA_FILE_KEYS if (name := getattr(data, key)) is not None}


def find_data_file_problems(document: YamlDocument, data: DataSection, model: str) -> Iterator[str]:
    """Yield a message for each missing file and each invalid row, and three ways to get the course's files.

    Args:
        document: the recipe, for locations.
        data: its valid `data` section.
        model: name of the model's folder in `recipes/`, for an example of a command.
    """
    files = list_data_files(data)
    missing = {key: path for key, path in files.items() if not path.exists()}
    for key, path in missing.items():
        yield document.problem(("data", key), f"{path}: no such file")
    if any(path.parent == COURSE_DATA for path in missing.values()):
        yield "Three ways to get data:"
        for number, way in enumerate(WAYS_TO_GET_DATA, 1):
            yield f"  {number}. {way.format(model=model)}"
    for key, path in files.items():
        if key not in missing:
            try:
                read_rows(path)
            except UserError as error:
                yield from error.problems
