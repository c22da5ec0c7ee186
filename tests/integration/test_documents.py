"""Documents agree with the files that they quote, accelerate configurations load, and CI runs the README's command."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from helpers import REPOSITORY

ACCELERATE_CONFIGS = sorted((REPOSITORY / "accelerate_configs").glob("*.yaml"))


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
