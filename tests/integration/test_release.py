"""The version of the package, the changelog and the citation file agree."""

import datetime
import re
import tomllib

import yaml
from helpers import REPOSITORY

from hw3 import __version__

CHANGELOG = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
# https://github.com/citation-file-format/citation-file-format/blob/1.2.0/schema.json
CITATION_KEYS = {
    "abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi", "identifiers", "keywords",
    "license", "license-url", "message", "preferred-citation", "references", "repository", "repository-artifact",
    "repository-code", "title", "type", "url", "version",
}  # fmt: skip


def test_version_is_written_in_the_package_only() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "hw3.__version__"}


def test_changelog_follows_keep_a_changelog() -> None:
    """The first section is for unreleased changes, and the second one is that of the version."""
    unreleased, *releases = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)
    assert unreleased == "[Unreleased]" and releases[0].startswith(f"[{__version__}] - ")
    for release in releases:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", release)
    kinds = set(re.findall(r"^### (.*)$", CHANGELOG, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_citation_file_is_valid_and_names_the_last_release() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"authors", "cff-version", "message", "title"} <= citation.keys() <= CITATION_KEYS
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software" and citation["license"] == "MIT"
    assert citation["authors"] == [{"name": "The hw3 contributors"}]
    assert isinstance(citation["date-released"], datetime.date)
    assert f"## [{citation['version']}] - {citation['date-released']}" in CHANGELOG
    assert citation["version"] == __version__
