"""Documents agree with the files that they quote, their commands work, and accelerate configurations load.

In the guides, code blocks without a language hold commands. The tests run them on the CPU, unless the line before the
block is a comment such as `<!-- needs: gpu -->`. The commands of such blocks, and those in sentences, are only parsed.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from helpers import REPOSITORY

from hw3.cli import _build_parser, _parse
from hw3.config.recipe import load_recipe
from hw3.modeling.devices import NO_BF16_OVERRIDES

ACCELERATE_CONFIGS = sorted((REPOSITORY / "accelerate_configs").glob("*.yaml"))
GUIDES = ("README.md", "docs/course.md", "docs/commands.md")
TRANSLATIONS = {"README.md": "README.zh-TW.md", "docs/course.md": "docs/course.zh-TW.md"}
NEEDS = {"gpu", "hub", "network", "course files", "files of yours", "minutes of its own", "terminal"}
OTHER_PROGRAMS = {"cp", "echo", "git", "mkdir", "python3", "rm", "tar", ".venv/bin/hf", ".venv/bin/python"}


class Command(NamedTuple):
    """A command of a guide.

    Attributes:
        line: The line, with its comment.
        needs: What the tests lack to run it; empty if they run it.
    """

    line: str
    needs: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)


def read_commands(document: str) -> Iterator[Command]:
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    blocks = re.findall(r"(?:^<!-- needs: ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for needs, language, code in blocks:
        if not language:
            yield from (Command(line, needs) for line in code.splitlines() if line)


def list_hw3_calls(command: Command) -> Iterator[list[str]]:
    """Yield the arguments of each `hw3` that a command calls; `make` shows what its targets would call."""
    words = command.words
    if words[0] == "make":
        dry_run = ["make", "-n", "--no-print-directory", "VENV=", *words[1:]]
        process = subprocess.run(dry_run, cwd=REPOSITORY, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        lines = process.stdout.replace("\\\n", " ").splitlines()
        calls = [shlex.split(line) for line in lines if re.match(r"hw3 |accelerate launch .* -m hw3 ", line)]
    else:
        calls = [words]
    for call in calls:
        for name in ("hw3", ".venv/bin/hw3"):
            if name in call:
                arguments = call[call.index(name) + 1 :]
                ends = [index for index, word in enumerate(arguments) if word in ("<", ">", "|")]
                yield arguments[: ends[0] if ends else None]


@pytest.mark.parametrize("document", [*GUIDES, *TRANSLATIONS.values()])
def test_commands_of_guides_parse(document: str) -> None:
    """Programs, targets, variables, options and recipe keys exist."""
    commands = list(read_commands(document))
    assert len(commands) > 10
    text = (REPOSITORY / document).read_text(encoding="utf-8")
    inline = re.findall(r"`((?:make|\.venv/bin/hw3) [^`\n]+)`", text)
    commands += [Command(line, "") for line in inline if not re.search(r"\.\.\.|MODEL=mine|COMMAND", line)]
    for command in commands:
        program = command.words[0]
        assert program in {"make", ".venv/bin/hw3"} | OTHER_PROGRAMS, command.line
        assert set(filter(None, command.needs.split(", "))) <= NEEDS, command.needs
        for arguments in list_hw3_calls(command):
            try:
                parsed = _parse(_build_parser(), arguments)
            except SystemExit:
                pytest.fail(f"{document}: {command.line}")
            recipe = getattr(parsed, "recipe", None)
            if arguments[0] in ("train", "check") and recipe.name != "RECIPE":
                load_recipe(REPOSITORY / recipe, parsed.overrides)


@pytest.mark.parametrize(("document", "translation"), TRANSLATIONS.items())
def test_translations_have_the_same_commands(document: str, translation: str) -> None:
    original, translated = (
        [(command.words, command.needs) for command in read_commands(name)] for name in (document, translation)
    )
    assert original == translated


def test_readmes_have_at_most_250_lines() -> None:
    for name in ("README.md", "README.zh-TW.md"):
        assert len((REPOSITORY / name).read_text(encoding="utf-8").splitlines()) <= 250


def test_readme_has_the_settings_for_gpus_without_bf16() -> None:
    assert f'make train MODEL=gemma SET="{NO_BF16_OVERRIDES}"' in (REPOSITORY / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_commands_of_guides_run_in_a_clean_clone(tmp_path: Path) -> None:
    """All commands that need nothing else, in the order of the guides; takes about ten minutes."""
    clone = tmp_path / "clone"
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "__pycache__", "*.egg-info", ".*_cache", "my", "outputs", "scratch"
    )
    shutil.copytree(REPOSITORY, clone, ignore=ignore, symlinks=True)
    for name in ("homework", "smollm2", "built"):
        shutil.rmtree(clone / "data" / name, ignore_errors=True)
    (clone / ".venv").symlink_to(sys.prefix)
    for arguments in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "a"],
    ):
        subprocess.run(["git", *arguments], cwd=clone, check=True)
    environment = os.environ | {"VENV": "", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"PYTHONPATH": str(clone), "HF_HUB_OFFLINE": "1"}
    done = set()
    for document in GUIDES:
        for command in read_commands(document):
            if command.needs or tuple(command.words) in done:
                continue
            done.add(tuple(command.words))
            process = subprocess.run(
                ["bash", "-o", "pipefail", "-c", command.line],
                cwd=clone,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
            assert process.returncode == 0, f"{document}: {command.line}\n{process.stdout}{process.stderr}"
    assert (clone / "outputs/tiny-qlora/report.html").is_file()
    assert (clone / "outputs/tiny-qlora-pack/prediction.json").is_file()
    assert (clone / "b12345678.zip").is_file()


def test_generated_tables_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, REPOSITORY / "tools/fill_readme.py", "--check"], cwd=REPOSITORY)
    assert done.returncode == 0, "run: python tools/fill_readme.py"


def test_accelerate_configs_are_the_documented_ones() -> None:
    assert [path.stem for path in ACCELERATE_CONFIGS] == ["cpu2", "ddp", "fsdp2", "multi_node", "zero3"]


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_config_loads(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.distributed_type == {"fsdp2": "FSDP", "zero3": "DEEPSPEED"}.get(path.stem, "MULTI_GPU")
    assert config.use_cpu == (path.stem == "cpu2")
    # The command gives the number of processes, the rank of the machine, and the address of the first one. A user would
    # forget to change them in the file.
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert not written.keys() & {"num_processes", "main_process_ip", "main_process_port"}
    assert ("machine_rank" in written) == (written["num_machines"] == 1) == (path.stem != "multi_node")


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_config_header_has_command_and_test_status(path: Path) -> None:
    """The header has a command that uses the file, and reports whether it was run, when, and on which machine."""
    header = "".join(re.findall(r"^# (.*\n)", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert re.search(rf"{path.stem}\.yaml|ACCELERATE={path.stem}", header)
    assert re.search(r"^(Run|Not run) .*(\d{4}-\d\d-\d\d|by the tests|GPUs yet)", header, re.MULTILINE)


def test_links_in_documents_exist() -> None:
    for document in (*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document}: {target}"


def test_anchors_in_documents_exist() -> None:
    for document in (*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")):
        for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", document.read_text(encoding="utf-8")):
            path = document.parent / target if target else document
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            # As GitHub makes them: lower case, without punctuation, with hyphens for spaces.
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{document}: {target}#{anchor}"


def test_saved_results_belong_to_the_repositorys_recipe_and_data() -> None:
    results = json.loads((REPOSITORY / "docs/tiny/results.json").read_text(encoding="utf-8"))
    manifest = json.loads((REPOSITORY / "docs/tiny/manifest.json").read_text(encoding="utf-8"))
    from hw3.common.hashing import file_sha256
    from hw3.config.recipe import load_recipe
    from hw3.modeling.fingerprint import hash_base_model

    recipe = load_recipe(REPOSITORY / "docs/tiny/recipe.yaml")
    assert recipe.training == load_recipe(REPOSITORY / "recipes/tiny/qlora.yaml").training
    section = recipe.model.model_copy(update={"pretrained_model_name_or_path": str(REPOSITORY / "data/tiny")})
    assert manifest["base"]["sha256"] == hash_base_model(section)
    assert results["data"]["sha256"] == file_sha256(REPOSITORY / "data/eval.json")
    assert manifest["data"]["train"]["sha256"] == file_sha256(REPOSITORY / "data/train.json")


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "make test" in (REPOSITORY / ".ci/run").read_text(encoding="utf-8")
    assert "\nmake test " in (REPOSITORY / "README.md").read_text(encoding="utf-8")
