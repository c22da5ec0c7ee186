"""Interrupt and damage the commands of a run at random moments, and check that the results are those of no faults.

    python tools/soak.py --seed 0 --rounds 30 --output docs/soak

Each round trains, scores, predicts, exports and builds data with a small random model; every sixth round also packs.
Faults are drawn from the seed and the number of the round: SIGKILL, signals that stop, a full disk, a limit on file
sizes, a flipped bit, and a second process that runs the same command. After its faults, each command is run once more
and must end with status 0. Then weights, scores, predictions, models and data files must equal those of a reference
without faults, `hw3 verify` must end with 0, and no temporary file or process may be left. No attempt may end with a
traceback.

`OUTPUT/log.jsonl` gets one line per round, and `OUTPUT/summary.md` is made from it. If the program is stopped, the same
command runs the rounds that are not in the log. It repeats those that failed, and the log keeps both lines. The program
ends with status 1 if a round failed when it was run last.

Commands run in processes that are forked from this one, which has imported all packages. A full disk needs a file
system of its own: root mounts one in memory. Others leave that fault out. With `--gpu`, commands use the first GPU, and
training uses the CUDA-graph step.

Another seed, or other rounds (`--start 4 --rounds 2` runs rounds 4 and 5), may run at the same time with the same
`--output`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import soak_gpu
from soak_log import find_last_lines, read_log, write_summary
from soak_process import Attempt, Command, Fault, Process, import_packages, in_child, run_in_children

REPOSITORY = Path(__file__).resolve().parent.parent

DISK_BYTES = 64 * 2**20
ROUNDS_PER_PACK = 6  # `hw3 pack` starts Python three times, which takes as long as all other commands
ENTRY_FIELDS_THAT_VARY = ("seconds",)


class RoundFailedError(Exception):
    """A round's outcome is not that of the reference; the message explains it."""


class Soak:
    """The rounds of one seed, in a temporary folder.

    Args:
        work: the folder, on a file system of its own if the disk can be filled.
        seed: seed of all rounds.
        kinds: kinds of faults.
        overrides: overrides of the recipe.
    """

    def __init__(self, work: Path, seed: int, kinds: list[str], overrides: list[str]) -> None:
        self.work = self.inputs = work
        self.overrides = overrides
        self.seed = seed
        self.kinds = kinds
        self.folder = work / "round"
        self.commands = self._list_commands()
        self.reference: dict[str, str] = {}

    def _list_commands(self) -> list[Command]:
        run = str(self.folder / "run")
        last, eval_file = ["--checkpoint", "checkpoint-12"], str(self.inputs / "eval.json")
        parts, built = str(self.inputs / "parts"), str(self.folder / "built")
        return [
            Command("data build", ["data", "build", "--corpus", parts, "--output", built, *_small_splits()]),
            Command("train", ["train", str(self.inputs / "mini/qlora.yaml"), "--run", run, *self.overrides],
                    "run/checkpoint-*/*"),
            Command("eval", ["eval", run], "run/eval/*/rows.parquet", "run/eval/eval"),
            Command("predict", ["predict", run, eval_file, *last],
                    "run/predictions/eval/*checkpoint-12.[jp]*"),
            Command("export", ["export", run, *last, "--output", str(self.folder / "exported")]),
            Command("pack", ["pack", run, *last, "--output", str(self.folder / "packed"), "--input", eval_file]),
        ]  # fmt: skip

    def run_reference(self, *, with_pack: bool) -> None:
        """Write the base model and the data, and run all commands without faults."""
        in_child(lambda: _write_inputs(self.inputs))
        self.folder.mkdir()
        for command in self.commands:
            if command.name == "pack" and not with_pack:
                continue
            events_file = self.work / "events"
            process = Process(command.arguments, self.folder, events_file=events_file)
            attempt = process.wait()
            if attempt.status != 0:
                raise SystemExit(f"{command.name} failed without faults:\n{attempt.text}")
            command.seconds = time.monotonic() - process.started
            command.num_events = int(events_file.read_text(encoding="utf-8"))
        self.reference = _describe_results(self.folder)
        shutil.rmtree(self.folder)

    def move_to(self, work: Path) -> None:
        """Run the next rounds in another folder. Inputs and reference stay."""
        self.work, self.folder = work, work / "round"
        for command, moved in zip(self.commands, self._list_commands(), strict=True):
            command.arguments = moved.arguments

    def run_round(self, number: int) -> dict[str, Any]:
        """Run one round; return its line of the log. The folder of a round that failed is kept."""
        draw = random.Random(f"{self.seed} {number}")
        self.folder.mkdir()
        started = time.monotonic()
        line: dict[str, Any] = {"seed": self.seed, "round": number, "faults": []}
        try:
            for command in self.commands:
                faults = command.draw_faults(draw, self.kinds)
                if command.name == "pack" and number % ROUNDS_PER_PACK:
                    continue
                for fault in faults:
                    record = {"command": command.name, "kind": fault.kind, "moment": fault.moment}
                    line["faults"].append(record)
                    record["outcome"] = self._run_with_fault(command, fault)
                self._run_to_the_end(command)
            self._check_results()
        except RoundFailedError as error:
            reason = str(error).replace(f"{self.folder}/", "").replace(f"{REPOSITORY}/", "")
            return line | {"seconds": round(time.monotonic() - started, 1), "outcome": "failed", "reason": reason}
        shutil.rmtree(self.folder)
        return line | {"seconds": round(time.monotonic() - started, 1), "outcome": "passed"}

    def _run_with_fault(self, command: Command, fault: Fault) -> str:
        """Run a command with a fault; return how it ended."""
        if self._is_done(command):
            return "not reached"
        if fault.kind == "bit_flip":
            return self._flip_bit(command, fault)
        if fault.kind == "second_writer":
            return self._run_twice(command, fault)
        event = 0 if fault.by_time else 1 + int(fault.moment * command.num_events)
        process = Process(command.arguments, self.folder, fault, event)
        attempt = process.wait(kill_after=fault.moment * command.seconds if fault.by_time else None)
        self._check_attempt(command, fault, process, attempt)
        (self.work / "ballast").unlink(missing_ok=True)
        _let_time_pass(self.folder)
        return "not reached" if attempt.status == 0 and fault.kind in ("kill", "stop") else f"status {attempt.status}"

    def _check_attempt(self, command: Command, fault: Fault, process: Process, attempt: Attempt) -> None:
        allowed = {
            "kill": (0, -signal.SIGKILL),
            "stop": (0, 128 + fault.number),
        }.get(fault.kind, (0, 1, 2))
        problem = None
        if attempt.status not in allowed:
            problem = f"ended with status {attempt.status}"
        elif "Traceback" in attempt.text:
            problem = "ended with a traceback"
        elif fault.kind != "kill" and process.has_left_processes():
            problem = "has left processes"
        if fault.kind == "kill":
            process.has_left_processes()
        if problem:
            raise RoundFailedError(f"{command.name} with {fault}: {problem}:\n{attempt.text[-3000:]}")

    def _run_twice(self, command: Command, fault: Fault) -> str:
        """Run a command in two processes. One may be refused; none may fail."""
        processes = [Process(command.arguments, self.folder)]
        time.sleep(fault.moment * command.seconds if fault.by_time else 0)
        processes.append(Process(command.arguments, self.folder))
        attempts = [process.wait() for process in processes]
        for process, attempt in zip(processes, attempts, strict=True):
            self._check_attempt(command, fault, process, attempt)
        statuses = sorted(attempt.status for attempt in attempts)
        if statuses[0] != 0 or statuses[1] not in (0, 2):
            texts = "\n---\n".join(attempt.text[-1500:] for attempt in attempts)
            raise RoundFailedError(f"two processes of {command.name} ended with {statuses}:\n{texts}")
        return "refused" if statuses[1] else "both ended with 0"

    def _flip_bit(self, command: Command, fault: Fault) -> str:
        """Flip a bit of what the command has written, or has written in part."""
        assert command.flip_in is not None
        if not (files := self._list_nonempty_files(command.flip_in)):
            self._run_to_the_end(command)
            files = self._list_nonempty_files(command.flip_in)
        if command.name == "train":  # the command reads the newest checkpoint only
            newest = max(files, key=lambda path: int(path.parent.name.partition("-")[2])).parent
            files = [path for path in files if path.parent == newest]
        draw = random.Random(fault.number)
        path = draw.choice(files)
        content = bytearray(path.read_bytes())
        place = draw.randrange(len(content))
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        attempt = Process(command.arguments, self.folder).wait()
        where = f"{path.relative_to(self.folder)}, byte {place}"
        if attempt.status == 2 and command.delete_if_damaged and "delete the folder" in attempt.text:
            shutil.rmtree(self.folder / command.delete_if_damaged)
            return f"{where}: reported"
        if attempt.status != 0 or "Traceback" in attempt.text:
            raise RoundFailedError(f"{command.name} after a flipped bit in {where}: {attempt.text[-3000:]}")
        return f"{where}: mended"

    def _list_nonempty_files(self, pattern: str) -> list[Path]:
        return sorted(path for path in self.folder.glob(pattern) if path.is_file() and path.stat().st_size)

    def _run_to_the_end(self, command: Command) -> None:
        """Run a command without faults. It refuses to replace a folder that it has created."""
        expected = 2 if self._is_done(command) else 0
        process = Process(command.arguments, self.folder)
        attempt = process.wait()
        if attempt.status != expected or "Traceback" in attempt.text or process.has_left_processes():
            raise RoundFailedError(f"{command.name} does not recover: status {attempt.status}\n{attempt.text[-3000:]}")

    def _is_done(self, command: Command) -> bool:
        """Return whether a command has created its folder, which it does not replace."""
        if "--output" not in command.arguments:
            return False
        output = Path(command.arguments[command.arguments.index("--output") + 1])
        return (output / "data.json").exists() if command.name == "data build" else output.exists()

    def _check_results(self) -> None:
        """Compare all results with the reference, and run `hw3 verify`."""
        results = _describe_results(self.folder)
        # A signal may have added checkpoints at other steps, with scores.
        different = [
            name
            for name, value in self.reference.items()
            if results.get(name) != value and not (name.startswith("packed/") and not (self.folder / "packed").exists())
        ]
        if different:
            raise RoundFailedError(f"differs from the reference: {', '.join(different)}")
        if left := [str(path.relative_to(self.folder)) for path in self.folder.rglob(".*")]:
            raise RoundFailedError(f"left: {', '.join(left)}")
        attempt = Process(["verify", str(self.folder / "run")], self.folder).wait()
        if attempt.status != 0:
            raise RoundFailedError(f"hw3 verify: status {attempt.status}\n{attempt.text[-3000:]}")


def _describe_results(folder: Path) -> dict[str, str]:
    """Return what must not depend on faults: hashes of files, and entries of scores, by name."""
    patterns = ["run/checkpoint-*/adapter_model.safetensors", "run/predictions/*/*[0-9].json", "built/*"]
    patterns += ["exported/*.safetensors", "packed/adapter_checkpoint/*.safetensors", "packed/prediction.json"]
    results = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in patterns
        for path in folder.glob(pattern)
    }
    for path in folder.glob("run/eval/*/results.json"):
        for entry in json.loads(path.read_text(encoding="utf-8"))["entries"]:
            values = {key: value for key, value in entry.items() if key not in ENTRY_FIELDS_THAT_VARY}
            results[f"score of {entry['checkpoint']} on {path.parent.name}"] = json.dumps(values, sort_keys=True)
    return results


def _let_time_pass(folder: Path) -> None:
    """Date all hidden files back by an hour: temporary files of the last minutes may belong to a running process."""
    for path in folder.rglob(".*"):
        with contextlib.suppress(FileNotFoundError):
            os.utime(path, (time.time() - 3600,) * 2)


def _write_inputs(work: Path) -> None:
    from helpers import write_recipe
    from sample_corpus import PAIRS, write_parts
    from tiny_models import GENERATION_SHAPE, write_base
    from transformers import LlamaConfig

    base = write_base(work / "base", LlamaConfig(**GENERATION_SHAPE, num_attention_heads=4, num_key_value_heads=2))
    write_recipe(work, base)
    write_parts(work / "parts", PAIRS)


def _small_splits() -> list[str]:
    from sample_corpus import SMALL_SPLITS

    return list(SMALL_SPLITS)


@contextlib.contextmanager
def _work_folder() -> Iterator[tuple[Path, bool]]:
    """Yield a new folder, and whether it is on a file system of its own."""
    folder = Path(tempfile.mkdtemp(prefix="hw3-soak-"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    is_mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield folder, is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        shutil.rmtree(folder)


def main(argv: list[str] | None = None) -> int:
    """Run the rounds that are not in the log yet; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all faults; default: 0")
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="number of rounds; default: 30")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="number of the first round; default: 0")
    parser.add_argument("--gpu", action="store_true", help="run the commands on the first GPU")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="rounds at the same time; default: 1")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of log.jsonl and summary.md")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the folder is unmounted
    arguments.output.mkdir(parents=True, exist_ok=True)
    log = arguments.output / "log.jsonl"
    passed = {(line["seed"], line["round"]) for line in read_log(log) if line["outcome"] == "passed"}
    numbers = range(arguments.start, arguments.start + arguments.rounds)
    missing = [number for number in numbers if (arguments.seed, number) not in passed]
    failed_now = 0
    if missing:
        failed_now = _run_rounds(arguments.seed, missing, log, gpu=arguments.gpu, processes=arguments.processes)
    write_summary(log, arguments.output / "summary.md")
    lines = find_last_lines(read_log(log))
    failed = sum(line["outcome"] != "passed" for line in lines)
    print(f"{arguments.output}/summary.md: {len(lines)} rounds, {failed} failed")
    return 1 if failed or failed_now else 0  # a process that ends early has no line


def _run_rounds(seed: int, numbers: list[int], log: Path, *, gpu: bool, processes: int) -> int:
    """Run a reference without faults, then rounds, some at the same time; return how many failed."""
    device, capability = soak_gpu.describe_gpu() if gpu else (None, None)
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "GOMP_SPINCOUNT": "20000",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
    }
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests/corpus")]
    with contextlib.nullcontext() if capability is None else soak_gpu.without_cuda_context(capability):
        import_packages()
    with _work_folder() as (work, is_mounted):
        kinds = ["kill", "kill", "stop", "file_size_limit", "bit_flip", "second_writer"]
        soak = Soak(work, seed, [*kinds, *["disk_full"] * is_mounted], soak_gpu.TRAINING_OVERRIDES if gpu else [])
        soak.run_reference(with_pack=any(number % ROUNDS_PER_PACK == 0 for number in numbers))
        if processes == 1:
            return _run_in_order(soak, numbers, log, device)
        parts = [numbers[first::processes] for first in range(min(processes, len(numbers)))]
        return run_in_children([partial(_run_elsewhere, soak, part, log, device) for part in parts])


def _run_elsewhere(soak: Soak, numbers: list[int], log: Path, device: str | None) -> int:
    """Run rounds on a file system of their own, which only they can fill; return how many failed."""
    with _work_folder() as (work, _):
        soak.move_to(work)
        return _run_in_order(soak, numbers, log, device)


def _run_in_order(soak: Soak, numbers: list[int], log: Path, device: str | None) -> int:
    """Run rounds, and append their lines to the log; return how many failed."""
    failed = 0
    for number in numbers:
        line = soak.run_round(number) | ({} if device is None else {"device": device})
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"round {number}: {line['outcome']}, {len(line['faults'])} faults, {line['seconds']} s", flush=True)
        if line["outcome"] != "passed":
            failed += 1
            print(line["reason"], flush=True)
            shutil.copytree(soak.folder, log.parent / f"failed-{soak.seed}-{number}", dirs_exist_ok=True)
            shutil.rmtree(soak.folder)
    return failed


if __name__ == "__main__":
    sys.exit(main())
