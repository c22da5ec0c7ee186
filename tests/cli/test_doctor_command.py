"""`hw3 doctor` names what a machine lacks, also where PyTorch is missing or broken."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ENVIRONMENT, REPOSITORY

from hw3.cli import doctor_command
from hw3.common.disk import format_bytes


def doctor(*, module_path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `hw3 doctor`, with modules from a folder before those that are installed."""
    path = {} if module_path is None else {"PYTHONPATH": str(module_path)}
    return subprocess.run(
        [sys.executable, "-m", "hw3", "doctor"],
        capture_output=True, text=True, cwd=REPOSITORY, env=ENVIRONMENT | path | environment,
    )  # fmt: skip


def test_doctor_finds_that_the_model_of_the_repository_can_be_trained(tmp_path: Path) -> None:
    done = doctor(HF_TOKEN="hf_secret", HF_HUB_OFFLINE="0", HF_ENDPOINT="http://user:hf_password@127.0.0.1:1")
    assert done.returncode == 0, done.stdout + done.stderr
    findings = {line[9:23].strip(): line for line in done.stdout.splitlines() if line[:8].strip() in ("ok", "note")}
    assert findings["packages"].startswith("ok") and findings["libraries"].startswith("ok")
    assert "bitsandbytes" in findings["4-bit product"] and findings["4-bit product"].startswith("ok")
    assert "127.0.0.1 cannot be reached" in findings["hub"] and findings["hub"].startswith("note")
    assert "hf_" not in done.stdout + done.stderr
    assert done.stdout.endswith("The model in this repository can be trained on this machine: make train\n")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("raise ModuleNotFoundError(\"No module named 'torch'\")", "ModuleNotFoundError: No module named 'torch'"),
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "OSError: libcudart.so.13: cannot open"),
    ],
)
def test_doctor_reports_a_broken_pytorch_and_goes_on(tmp_path: Path, content: str, error: str) -> None:
    (tmp_path / "torch.py").write_text(content, encoding="utf-8")
    done = doctor(module_path=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"PROBLEM  PyTorch        torch cannot be imported: {error}" in done.stdout
    assert "\nok       memory " in done.stdout
    assert done.stdout.endswith("Training will fail on this machine: first mend what is marked PROBLEM\n")


def test_check_versions_names_missing_and_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["numpy>=99", "no-such-package>=1,<2", "pydantic>=2", "tomli>=1; python_version < '3.11'"]
    monkeypatch.setattr(doctor_command, "_read_requirements", lambda: texts)
    (problem, problem_subject, missing), (note, _, other) = doctor_command.check_versions()
    assert (problem, problem_subject, note) == ("PROBLEM", "packages", "note")
    assert missing.startswith("missing: no-such-package<2,>=1; install again: ") and "tomli" not in missing
    assert other.startswith("not the tested versions: numpy ") and "(tested: >=99)" in other


@pytest.mark.parametrize(("free", "status"), [(2**20, "PROBLEM"), (2**30, "note"), (2**40, "ok")])
def test_check_disk_compares_the_free_space(monkeypatch: pytest.MonkeyPatch, free: int, status: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**41, 2**41 - free, free))
    ((found, _, text),) = doctor_command.check_disk()
    assert found == status and text.startswith(f"{format_bytes(free)} free")


def test_check_torch_tells_a_build_without_cuda_from_a_missing_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = {subject: (status, text) for status, subject, text in doctor_command.check_torch()}
    assert findings["GPU"][0] == "note" and findings["GPU"][1].startswith("no NVIDIA driver")
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '580.95.05, Tesla T4'\n", encoding="utf-8")
    program.chmod(0o755)
    findings = {subject: (status, text) for status, subject, text in doctor_command.check_torch()}
    assert findings["GPU"][1].startswith("driver 580.95.05, Tesla T4, but PyTorch ")
    assert findings["4-bit product"][0] == "ok"


def test_doctor_notes_systems_other_than_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    ((status, _, text),) = doctor_command.check_python()
    assert (
        status == "note"
        and " on Darwin " in text
        and text.endswith("hw3 has been tried on Linux only (docs/versions.md)")
    )
