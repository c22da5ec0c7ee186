"""Documents say what the files say, accelerate files load, and CI runs what the README runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from helpers import REPOSITORY

ACCELERATE = sorted((REPOSITORY / "accelerate_configs").glob("*.yaml"))


def test_tables_are_filled_from_files() -> None:
    done = subprocess.run([sys.executable, REPOSITORY / "tools/fill_readme.py", "--check"], cwd=REPOSITORY)
    assert done.returncode == 0, "run: python tools/fill_readme.py"


def test_how_many_accelerate_files() -> None:
    assert [path.stem for path in ACCELERATE] == ["cpu2", "ddp", "fsdp2", "multi_node", "zero3"]


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_file_loads(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.distributed_type == {"fsdp2": "FSDP", "zero3": "DEEPSPEED"}.get(path.stem, "MULTI_GPU")
    assert config.use_cpu == (path.stem == "cpu2")
    # How many processes, which machine this is, and where the first one is, comes from the command; a number here
    # would be forgotten.
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert not written.keys() & {"num_processes", "main_process_ip", "main_process_port"}
    assert ("machine_rank" in written) == (written["num_machines"] == 1) == (path.stem != "multi_node")


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_file_says_what_was_run(path: Path) -> None:
    """Every one opens with a command that has it, and says whether it was run, when and on what."""
    header = "".join(re.findall(r"^# (.*\n)", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert re.search(rf"{path.stem}\.yaml|ACCELERATE={path.stem}", header)
    assert re.search(r"^(Run|Not run) .*(\d{4}-\d\d-\d\d|by the tests|GPUs yet)", header, re.MULTILINE)


def test_links_and_pictures_exist() -> None:
    for document in (REPOSITORY / "README.md", REPOSITORY / "docs/homework/README.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document}: {target}"


def test_kept_results_are_of_the_recipe_in_the_repository() -> None:
    results = json.loads((REPOSITORY / "docs/tiny/results.json").read_text(encoding="utf-8"))
    manifest = json.loads((REPOSITORY / "docs/tiny/manifest.json").read_text(encoding="utf-8"))
    from hw3.common.hashing import file_sha256
    from hw3.config.recipe import load_recipe
    from hw3.modeling.fingerprint import base_sha256
    from hw3.modeling.loading import load_config

    recipe = load_recipe(REPOSITORY / "docs/tiny/recipe.yaml")
    assert recipe.training == load_recipe(REPOSITORY / "recipes/tiny/qlora.yaml").training
    section = recipe.model.model_copy(update={"pretrained_model_name_or_path": str(REPOSITORY / "data/tiny")})
    assert manifest["base"]["sha256"] == base_sha256(section, load_config(section))
    assert results["data"]["sha256"] == file_sha256(REPOSITORY / "data/eval.json")
    assert manifest["data"]["train"]["sha256"] == file_sha256(REPOSITORY / "data/train.json")


def test_ci_runs_the_readmes_test_command() -> None:
    assert "make test" in (REPOSITORY / ".ci/run").read_text(encoding="utf-8")
    assert "\nmake test " in (REPOSITORY / "README.md").read_text(encoding="utf-8")
