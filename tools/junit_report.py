"""Read the JUnit files that pytest writes."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path


def read_test_cases(report: Path) -> Iterator[tuple[ElementTree.Element, str]]:
    """Yield the element of each test, and its outcome: `passed`, `failed` or `skipped`."""
    for case in ElementTree.parse(report).iter("testcase"):
        tags = {element.tag for element in case}
        yield case, "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
