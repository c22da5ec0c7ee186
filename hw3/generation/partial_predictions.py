"""Save every prediction as soon as it is generated, so that a stopped call can be continued."""

from __future__ import annotations

import glob
import json
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TextIO

from hw3.common.atomic_io import write_atomically
from hw3.common.distributed import gather_objects, get_rank


@dataclass(frozen=True, slots=True)
class Prediction:
    """The output for one row.

    Attributes:
        id: the row's id.
        output: the generated text.
        finished: whether the model generated a stop token; otherwise the output was cut at its limit.
        seconds: this prediction's share of the time. The sum over the predictions of all processes is the time that
            the call took.
    """

    id: str
    output: str
    finished: bool
    seconds: float


_FIELDS = {field.name for field in fields(Prediction)}
_CHECKSUM = "crc32"


@dataclass
class PartialPredictions:
    """Predictions of a call that has not ended, in a file per process.

    The first line holds the key of the predictions, every further line one `Prediction` with a checksum.

    Attributes:
        path: the file of this process.
        by_id: predictions by row id, in the order in which they were generated.
    """

    path: Path
    by_id: dict[str, Prediction] = field(default_factory=dict)

    @classmethod
    def open(cls, predictions_path: Path, key: str) -> PartialPredictions:
        """Continue the partial predictions with this key; delete those with another key.

        The first process takes over the files of all processes, because their number may have changed.

        Args:
            predictions_path: where the complete predictions will be.
            key: hash of everything that the predictions depend on.
        """
        partial = cls(_partial_path(predictions_path, get_rank()))
        if get_rank() == 0:
            existing = _list_partial_paths(predictions_path)
            for path in existing:
                partial.by_id |= _read_partial_file(path, key)
            partial._rewrite(key)
            for path in existing:
                if path != partial.path:
                    path.unlink()
        partial.by_id = gather_objects(partial.by_id)[0]
        if get_rank() != 0:
            cls(partial.path)._rewrite(key)
        return partial

    def add(self, prediction: Prediction, file: TextIO) -> None:
        """Add a prediction, and append it to this process's file, which is open for appending."""
        self.by_id[prediction.id] = prediction
        file.write(_to_json_line(_with_checksum(asdict(prediction))))
        file.flush()

    def gather(self) -> None:
        """Add the predictions of all other processes."""
        for by_id in gather_objects(self.by_id):
            self.by_id |= by_id

    def _rewrite(self, key: str) -> None:
        # A line that a crash cut short is left out, so that new lines start at the beginning of a line.
        lines: list[dict[str, object]] = [
            {"key": key},
            *(_with_checksum(asdict(prediction)) for prediction in self.by_id.values()),
        ]
        write_atomically(self.path, "".join(map(_to_json_line, lines)))


def remove_partial_predictions(predictions_path: Path) -> None:
    """Delete the partial predictions of all processes."""
    for path in _list_partial_paths(predictions_path):
        path.unlink(missing_ok=True)


def _partial_path(predictions_path: Path, rank: int) -> Path:
    suffix = f"-{rank}" if rank else ""
    return predictions_path.with_name(f".{predictions_path.stem}.partial{suffix}.jsonl")


def _list_partial_paths(predictions_path: Path) -> list[Path]:
    return sorted(predictions_path.parent.glob(f".{glob.escape(predictions_path.stem)}.partial*.jsonl"))


def _read_partial_file(path: Path, key: str) -> dict[str, Prediction]:
    """Return the predictions of one file by row id, up to a line that is damaged or cut; none with another key."""
    if not path.exists():
        return {}
    values = [_parse_line(line) for line in path.read_bytes().split(b"\n")[:-1]]
    if not values or values[0] != {"key": key}:
        return {}
    by_id = {}
    for value in values[1:]:
        if value is None or value.keys() != _FIELDS or not isinstance(value["id"], str):
            break
        by_id[value["id"]] = Prediction(**value)
    return by_id


def _to_json_line(value: dict[str, object]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _with_checksum(value: dict[str, object]) -> dict[str, object]:
    return value | {_CHECKSUM: zlib.crc32(_to_json_line(value).encode())}


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """Return the value of a line; None if it is cut, or does not have its checksum."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    checksum = value.pop(_CHECKSUM, None)  # the line with the key has none
    return value if checksum is None or _with_checksum(value)[_CHECKSUM] == checksum else None
