"""The documentation's site: it builds without a warning, with every page, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

import bigsae

for package in ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers.python"):
    pytest.importorskip(package, reason="needs bigsae[docs]")

ROOT = Path(__file__).parent.parent


def build(source: Path, site: Path) -> tuple[int, str]:
    """Exit status and output of a strict build of the site of `source`."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=source,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    code, output = build(ROOT, folder)
    assert code == 0, output
    assert "WARNING" not in output
    return folder


def words(page: Path) -> str:
    """What a page's article says."""
    article = page.read_text().split("<article", 1)[1].split("</article>", 1)[0]
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", article)).split())


def test_every_page_is_there(site):
    pages = {path.parent.relative_to(site).as_posix() for path in site.rglob("index.html")}
    expected = {path.stem for path in (ROOT / "docs").glob("*.md")}
    expected |= {f"benchmarks/{path.stem}" for path in (ROOT / "benchmarks").glob("*.md")}
    assert pages == expected | {".", "examples", "reference/python", "reference/options"}


def test_the_front_page_is_the_readme(site):
    front = words(site / "index.html")
    for heading in re.findall(r"^## (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert heading in front
    assert 'href="mesh/"' in (site / "index.html").read_text()


def test_the_reference_has_all_that_is_exported_with_its_docstrings(site):
    options, others = (
        words(site / "reference/options/index.html"),
        words(site / "reference/python/index.html"),
    )
    for name in bigsae.__all__:
        assert name in (options if name.endswith("Config") else others)
    assert "Latents kept per token; on average in batchtopk and matryoshka." in options
    assert "batches : global [batch, d_in] tensors, the same ones on every rank" in others
    assert "The SAE in a folder, or in a repository of the Hub" in others


def test_all_pages_are_one_click_away(site):
    menu = (site / "index.html").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert f'href="{path.stem}/"' in menu


def test_links_that_lead_nowhere_end_the_build(tmp_path):
    """Of a page that nobody named in mkdocs.yml."""
    for name in ("docs", "benchmarks", "examples", "bigsae", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path / name)
    page = "# New\n\nSee [the plan](plan.md#nowhere) and [the code](../bigsae/nowhere.py).\n"
    (tmp_path / "docs" / "new.md").write_text(page)
    code, output = build(tmp_path, tmp_path / "site")
    assert code != 0
    assert "'plan.md' does not contain an anchor '#nowhere'" in output
    assert "docs/new.md links to ../bigsae/nowhere.py, which is not there" in output
