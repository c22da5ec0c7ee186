"""Save every prediction as soon as it is generated, so that a stopped call can be continued."""

from __future__ import annotations

import glob
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

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


@dataclass
class PartialPredictions:
    """Predictions of a call that has not ended, in a JSON Lines file per process.

    The first line holds the key of the predictions, every further line one `Prediction`.

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
        file.write(_to_json_line(asdict(prediction)))
        file.flush()

    def gather(self) -> None:
        """Add the predictions of all other processes."""
        for by_id in gather_objects(self.by_id):
            self.by_id |= by_id

    def _rewrite(self, key: str) -> None:
        # A line that a crash cut short is left out, so that new lines start at the beginning of a line.
        lines = [{"key": key}, *map(asdict, self.by_id.values())]
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
    """Return the predictions of one file by row id, up to a line that a crash cut short; none with another key."""
    if not path.exists():
        return {}
    lines = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    if not lines or lines[0] != {"key": key}:
        return {}
    return {line["id"]: Prediction(**line) for line in lines[1:]}


def _to_json_line(value: dict[str, object]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
