"""The packages' order, import cycles and sizes, as `tools/measure_structure.py` measures them."""

from pathlib import Path

import measure_structure
import pytest
from helpers import REPOSITORY
from measure_structure import (
    count_levels,
    find_cycles,
    find_untested_modules,
    find_upward_imports,
    find_violations,
    read_modules,
)


def write_modules(checkout: Path, sources: dict[str, str]) -> Path:
    """Write modules of `hw3`, by their path below it."""
    for name, source in sources.items():
        path = checkout / "hw3" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return checkout


def test_packages_import_only_lower_packages() -> None:
    assert find_upward_imports(read_modules(REPOSITORY)) == []


def test_modules_have_no_import_cycles() -> None:
    assert find_cycles(read_modules(REPOSITORY)) == []


def test_modules_and_functions_keep_their_size_limits() -> None:
    assert [line for line in find_violations(read_modules(REPOSITORY)) if "lines" in line or "exception" in line] == []


def test_upward_import_inside_a_function_is_found(tmp_path: Path) -> None:
    source = "def load():\n    from hw3.runs import checkpoints\n    return checkpoints\n"
    modules = read_modules(write_modules(tmp_path, {"data/rows.py": source, "runs/checkpoints.py": ""}))
    assert find_upward_imports(modules) == [("hw3.data.rows", "hw3.runs.checkpoints")]
    assert find_violations(modules) == ["hw3.data.rows imports hw3.runs.checkpoints, which is above it"]


def test_unlisted_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not in PACKAGES of tools/measure_structure\.py: helpers"):
        find_upward_imports(read_modules(write_modules(tmp_path, {"helpers/a.py": ""})))


def test_cycle_through_three_modules_is_found_and_stands_on_one_level(tmp_path: Path) -> None:
    sources = {
        "data/a.py": "import hw3.data.b\n",
        "data/b.py": "from hw3.data.c import x\n",
        "data/c.py": "from hw3.data import a, d\n",
        "data/d.py": "",
    }
    modules = read_modules(write_modules(tmp_path, sources))
    assert find_cycles(modules) == [["hw3.data.a", "hw3.data.b", "hw3.data.c"]]
    assert count_levels(modules) == 2


def test_long_module_and_long_method_are_found(tmp_path: Path) -> None:
    source = "class A:\n    def method(self):\n" + "        pass\n" * 60 + "\n" * 400
    modules = read_modules(write_modules(tmp_path, {"data/a.py": source}))
    assert find_violations(modules) == [
        "hw3.data.a has 462 lines; at most 400 are allowed",
        "hw3.data.a.A.method has 61 lines; at most 60 are allowed",
    ]


def test_exception_that_is_no_longer_needed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_structure, "LONG_MODULES", {"hw3.data.a": "a reason"})
    modules = read_modules(write_modules(tmp_path, {"data/a.py": ""}))
    assert find_violations(modules) == ["hw3.data.a needs no exception; delete it"]


def test_module_without_a_test_file_is_listed(tmp_path: Path) -> None:
    checkout = write_modules(tmp_path, {"data/__init__.py": "", "data/a.py": "", "data/b.py": "", "cli.py": ""})
    test = checkout / "tests/data/test_b.py"
    test.parent.mkdir(parents=True)
    test.touch()
    assert find_untested_modules(checkout, read_modules(checkout)) == ["hw3.cli", "hw3.data.a"]
