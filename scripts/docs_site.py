"""What mkdocs.yml cannot say: the pages that lie outside docs/, links between them, and the reference."""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path
from posixpath import dirname, normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# Named so that --strict counts its warnings.
logger = logging.getLogger("mkdocs.hooks.docs_site")

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the guides that the navigation does not name to their end."""
    nav: list[Any] = config.nav or []
    guides = next(entry["Guides"] for entry in nav if isinstance(entry, dict) and "Guides" in entry)
    guides += [path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in guides]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md as the front page, the pages beside docs/, and the reference."""
    pages = {str(page_of(path)): path.read_text() for path in outside()} | reference()
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages; of those to other files the words stay."""
    sources = {page_of(path): path for path in outside()}
    source = sources.get(page.file.src_uri, ROOT / "docs" / page.file.src_uri)
    if not source.exists():
        return markdown  # of the reference

    def rewritten(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        if "://" in target:
            return link[0]
        path = ROOT / normpath((source.parent / target).relative_to(ROOT))
        if not path.exists():
            logger.warning("%s links to %s, which is not there", source.relative_to(ROOT), target)
            return text
        uri = page_of(path)
        if uri is None:
            return text
        return f"[{text}]({relpath(uri, dirname(page.file.src_uri) or '.')}{anchor})"

    return LINK.sub(rewritten, markdown)


def outside() -> list[Path]:
    """The pages that do not lie in docs/."""
    return [
        ROOT / "README.md",
        *sorted((ROOT / "benchmarks").glob("*.md")),
        *sorted((ROOT / "examples").glob("*.md")),
    ]


def page_of(path: Path) -> str | None:
    """Where a file of the repository stands in the site, if it is a page of it."""
    if path == ROOT / "README.md":
        return "index.md"
    if path.suffix != ".md":
        return None
    relative = path.relative_to(ROOT)
    return relative.relative_to("docs").as_posix() if relative.parts[0] == "docs" else relative.as_posix()


def reference() -> dict[str, str]:
    """Pages with the docstrings of all that `bigsae` exports."""
    tree = ast.parse((ROOT / "bigsae" / "__init__.py").read_text())
    exported = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    of_a_run = {
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module == "bigsae.config"
        for alias in node.names
    }
    options = [name for name in exported if name.endswith("Config")]
    # Those of a run first, and among them the one that holds all others.
    options.sort(key=lambda name: (name not in of_a_run, name != "TrainConfig"))
    others = [name for name in exported if name not in options]
    return {
        "reference/python.md": "# From Python\n\n"
        + "What `import bigsae` gives; the options of a run are on [a page of their own](options.md).\n\n"
        + "".join(f"::: bigsae.{name}\n\n" for name in others)
        + "::: bigsae.sae.base.SAE\n    options:\n      members: [forward, encode, decode, save]\n",
        "reference/options.md": "# Options\n\n"
        + "Every option of `bigsae.train`, as in `--help`, and behind them those of other commands. `SAEConfig.k` is "
        + "`--sae.k` on the command line, and `k` under `sae` in a `--config` file.\n\n"
        + "".join(f"::: bigsae.{name}\n\n" for name in options),
    }
