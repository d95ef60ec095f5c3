"""What is said in several places about the package is said once: version, Python, torch, Lightning."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fx_passes
import sus_lightning

ROOT = Path(__file__).parents[1]


def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def lower_bounds() -> dict[str, str]:
    return dict(d.split(">=") for d in project()["project"]["dependencies"])


def test_one_version() -> None:
    version = fx_passes.__version__
    assert sus_lightning.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)[0] == version
    assert "version" in project()["project"]["dynamic"]


def test_the_oldest_versions_are_those_that_ci_tests() -> None:
    wanted = [f"{name}=={bound}.0" for name, bound in lower_bounds().items()]
    workflow = (ROOT / ".github/workflows/test.yml").read_text().replace("+cpu", "")
    script = (ROOT / ".ci/versions").read_text()
    assert all(pin in workflow for pin in wanted)
    assert all(pin in script for pin in wanted if not pin.startswith("torch=="))
    assert lower_bounds()["torch"] in (ROOT / "CONTRIBUTING.md").read_text()


def test_pythons_of_the_classifiers_are_those_of_the_matrix() -> None:
    classifiers = project()["project"]["classifiers"]
    pythons = [c.split(" :: ")[-1] for c in classifiers if re.search(r"Python :: 3\.\d+$", c)]
    matrix = re.search(r"python: (\[.*\])", (ROOT / ".github/workflows/test.yml").read_text())
    assert matrix is not None
    assert re.findall(r"3\.\d+", matrix[1]) == pythons
    assert project()["project"]["requires-python"] == f">={pythons[0]}"


def test_actions_are_pinned_to_commits() -> None:
    """A tag can be moved to other code; dependabot moves the commits, and the comments after them."""
    files = sorted((ROOT / ".github/workflows").glob("*.yml"))
    used = [line.strip() for file in files for line in file.read_text().splitlines() if "uses:" in line]
    assert used
    assert not [line for line in used if not re.fullmatch(r"(- )?uses: [\w./-]+@[0-9a-f]{40} # v[\d.]+", line)]


def test_the_readme_for_pypi_has_whole_addresses() -> None:
    done = subprocess.run([sys.executable, ROOT / ".ci/pypi_readme"], capture_output=True, text=True, check=True)
    links = re.findall(r"\]\(([^)\s]+)\)", done.stdout)
    assert len(links) > 10
    assert not [link for link in links if not link.startswith("https://")]
    assert "<!--" not in done.stdout
    assert (
        "](https://raw.githubusercontent.com/sus-lightning/sus-lightning/main/docs/img/time-against-n.png)"
        in done.stdout
    )


def test_links_of_the_root_pages_lead_to_files() -> None:
    for page in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"):
        links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
        assert not [link for link in links if "://" not in link and not (ROOT / link).exists()], page
