"""Measure how the code is divided: sizes of modules and functions, levels of imports, cycles, and replaced words.

    python tools/measure_structure.py [CHECKOUT] [--json]
    python tools/measure_structure.py --check      # exit with 1 if a size or an import breaks a rule

The rules: a package imports only packages below it in `PACKAGES`, modules do not import each other in a cycle, a module
has at most `MAX_MODULE_LINES` lines and a function at most `MAX_FUNCTION_LINES`. Imports inside functions count too.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from replaced_words import count_replaced_words

# From the lowest layer to the highest. `hw3` stands for `hw3/__init__.py`.
PACKAGES = (
    "hw3",
    "common",
    "data",
    "config",
    "modeling",
    "cuda_graphs",
    "runs",
    "corpus",
    "training",
    "evaluation",
    "metrics",
    "generation",
    "report",
    "export",
    "submission",
    "search",
    "cli",
    "__main__",
)
MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60
# Modules and functions that may be longer, each with its reason, such as {"hw3.training.trainer": "..."}.
LONG_MODULES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}

SOURCE_FOLDERS = ("hw3", "tests", "benchmarks", "tools")


@dataclass(frozen=True)
class Module:
    """One module of `hw3`.

    Attributes:
        package: the entry of `PACKAGES` that the module belongs to; a module that lies flat in `hw3/` is its own.
        lines: lines of its file.
        functions: lines of each function, docstring included, by qualified name.
        imports: the `hw3` modules that it imports, inside functions too.
    """

    package: str
    lines: int
    functions: dict[str, int]
    imports: frozenset[str]


def read_modules(checkout: Path) -> dict[str, Module]:
    """Parse every module of `hw3`; return them by dotted name."""
    files = {}
    for path in sorted((checkout / "hw3").rglob("*.py")):
        parts = path.relative_to(checkout).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    modules = {}
    for name, path in files.items():
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        package = name.split(".")[1] if "." in name else name
        imports = frozenset(_imported_modules(tree, files.keys())) - {name}
        functions = dict(_function_lines(tree, name))
        modules[name] = Module(package, source.count("\n"), functions, imports)
    return modules


def _imported_modules(tree: ast.Module, known: set[str]) -> set[str]:
    """Return the modules among `known` that the code imports; `from package import module` is that module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= submodules
            if len(submodules) < len(node.names):
                found.add(node.module)
    return found & known


def _function_lines(node: ast.AST, prefix: str) -> list[tuple[str, int]]:
    """Return the qualified name and the number of lines of every function and method, nested ones included."""
    found = []
    for child in ast.iter_child_nodes(node):
        name = prefix
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}.{child.name}"
            if not isinstance(child, ast.ClassDef):
                found.append((name, child.end_lineno - child.lineno + 1))
        found += _function_lines(child, name)
    return found


def find_cycles(modules: dict[str, Module]) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or through others."""
    reachable = _reachable_modules(modules)
    groups = {
        tuple(sorted(other for other in reachable[name] if name in reachable[other]))
        for name in modules
        if name in reachable[name]
    }
    return [list(group) for group in sorted(groups)]


def count_levels(modules: dict[str, Module]) -> int:
    """Return the number of levels if every module stands above all that it imports; a cycle stands on one level."""
    reachable = _reachable_modules(modules)

    @cache
    def level(name: str) -> int:
        cycle = {name} | {other for other in reachable[name] if name in reachable[other]}
        below = {imported for member in cycle for imported in modules[member].imports} - cycle
        return 1 + max(map(level, below), default=0)

    return max(map(level, modules), default=0)


def _reachable_modules(modules: dict[str, Module]) -> dict[str, set[str]]:
    """Return, for each module, the modules that it imports directly or through others."""
    reachable = {}
    for name in modules:
        found: set[str] = set()
        waiting = [name]
        while waiting:
            new = modules[waiting.pop()].imports - found
            found |= new
            waiting += new
        reachable[name] = found
    return reachable


def find_upward_imports(modules: dict[str, Module]) -> list[tuple[str, str]]:
    """Return the imports from a package to one above it.

    Raises:
        ValueError: A module belongs to no package of `PACKAGES`.
    """
    if unknown := sorted({module.package for module in modules.values()} - set(PACKAGES)):
        raise ValueError(f"not in PACKAGES of tools/measure_structure.py: {', '.join(unknown)}")
    order = {package: index for index, package in enumerate(PACKAGES)}
    return [
        (name, imported)
        for name, module in modules.items()
        for imported in sorted(module.imports)
        if order[modules[imported].package] > order[module.package]
    ]


def find_untested_modules(checkout: Path, modules: dict[str, Module]) -> list[str]:
    """Return the modules `hw3.PACKAGE.NAME` without a file `tests/PACKAGE/test_NAME.py`."""
    untested = []
    for name in modules:
        path = Path(*name.split("."))
        has_file = (checkout / path).with_suffix(".py").exists()
        if has_file and not path.name.startswith("__"):
            test = checkout / "tests" / path.relative_to("hw3").with_name(f"test_{path.name}.py")
            untested += [] if test.exists() else [name]
    return untested


def find_violations(modules: dict[str, Module]) -> list[str]:
    """Return one line for each broken rule, and for each exception in this file that is no longer needed."""
    functions = {name: lines for module in modules.values() for name, lines in module.functions.items()}
    sizes = {name: module.lines for name, module in modules.items()}
    found = _size_violations(sizes, MAX_MODULE_LINES, LONG_MODULES)
    found += _size_violations(functions, MAX_FUNCTION_LINES, LONG_FUNCTIONS)
    found += [f"{name} imports {imported}, which is above it" for name, imported in find_upward_imports(modules)]
    found += [f"these modules import each other: {', '.join(cycle)}" for cycle in find_cycles(modules)]
    return found


def _size_violations(sizes: dict[str, int], limit: int, exceptions: dict[str, str]) -> list[str]:
    too_long = {name: lines for name, lines in sizes.items() if lines > limit}
    found = [
        f"{name} has {lines} lines; at most {limit} are allowed"
        for name, lines in too_long.items()
        if name not in exceptions
    ]
    return found + [f"{name} needs no exception; delete it" for name in exceptions if name not in too_long]


@dataclass(frozen=True)
class Structure:
    """What this tool reports; lists hold (name, number) pairs, the largest first."""

    modules: int
    modules_by_package: dict[str, int]
    flat_modules: int
    lines: dict[str, int]
    longest_module: tuple[str, int]
    longest_function: tuple[str, int]
    modules_over_limit: list[tuple[str, int]]
    functions_over_limit: list[tuple[str, int]]
    levels: int
    imports: int
    upward_imports: list[tuple[str, str]] | None
    cycles: list[list[str]]
    untested_modules: list[str]
    replaced_words: dict[str, int]


def measure(checkout: Path) -> Structure:
    """Measure one checkout; `upward_imports` is None if its modules are not in the packages of `PACKAGES`."""
    modules = read_modules(checkout)
    sizes = Counter({name: module.lines for name, module in modules.items()}).most_common()
    functions = Counter({name: lines for module in modules.values() for name, lines in module.functions.items()})
    packages = Counter(module.package for name, module in modules.items() if name.count(".") > 1)
    try:
        upward_imports = find_upward_imports(modules)
    except ValueError:
        upward_imports = None
    return Structure(
        modules=len(modules),
        modules_by_package=dict(sorted(packages.items())),
        flat_modules=sum(path.name != "__init__.py" for path in (checkout / "hw3").glob("*.py")),
        lines={folder: _count_lines(checkout / folder) for folder in SOURCE_FOLDERS},
        longest_module=sizes[0],
        longest_function=functions.most_common(1)[0],
        modules_over_limit=[(name, lines) for name, lines in sizes if lines > MAX_MODULE_LINES],
        functions_over_limit=[(name, lines) for name, lines in functions.most_common() if lines > MAX_FUNCTION_LINES],
        levels=count_levels(modules),
        imports=sum(len(module.imports) for module in modules.values()),
        upward_imports=upward_imports,
        cycles=find_cycles(modules),
        untested_modules=find_untested_modules(checkout, modules),
        replaced_words=count_replaced_words(checkout, SOURCE_FOLDERS),
    )


def _count_lines(folder: Path) -> int:
    return sum(path.read_text(encoding="utf-8").count("\n") for path in folder.rglob("*.py"))


def format_structure(structure: Structure) -> str:
    """Return the measurements as text, one a line, lists indented."""
    lines = []
    for name, value in asdict(structure).items():
        title = name.replace("_", " ").replace("over limit", f"over {_limit(name)} lines")
        if isinstance(value, dict):
            value = list(value.items())
        if isinstance(value, list) and name != "modules_by_package":
            title += f" ({sum(number for _, number in value) if name == 'replaced_words' else len(value)})"
        if not isinstance(value, list):
            text = "n/a" if value is None else value if isinstance(value, int) else " ".join(map(str, value))
            lines.append(f"{title:<32}{text}")
            continue
        lines.append(title)
        for item in value:
            first, *others = [item] if isinstance(item, str) else item
            lines.append(f"    {first:<60} {' '.join(map(str, others))}".rstrip())
    return "\n".join(lines)


def _limit(name: str) -> int:
    return MAX_FUNCTION_LINES if name.startswith("functions") else MAX_MODULE_LINES


def main() -> int:
    """Print the measurements, or the broken rules under `--check`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("checkout", type=Path, nargs="?", default=Path(__file__).parent.parent)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--check", action="store_true", help="print only broken rules; exit with 1 if there are any")
    arguments = parser.parse_args()
    if arguments.check:
        violations = find_violations(read_modules(arguments.checkout))
        print("\n".join(violations), end="\n" if violations else "")
        return int(bool(violations))
    structure = measure(arguments.checkout)
    print(json.dumps(asdict(structure), indent=2) if arguments.json else format_structure(structure))
    return 0


if __name__ == "__main__":
    sys.exit(main())
