"""What the site needs beyond plain Markdown, so that the pages themselves hold no directives.

- docs/index.md lists the pages as links; their order becomes the navigation.
- Notebooks are pages: their cells are read as Markdown.
- reference/api/ is written from `__all__` of the public modules, for autodoc.
- project/ holds the Markdown files of the repository's root.
- Links to sources outside docs/ become downloads, and links to folders become text.
- A <picture> becomes two images, one for each colour scheme.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
# Public modules, in the order of the reference. A name that several export is documented under the first.
MODULES = (
    "trl", "trl.rewards", "trl.data", "trl.trackers", "trl.algorithms", "trl.models", "trl.rollout", "trl.protocols",
    "trl.types", "trl.functional", "trl.functional.policy_gradients", "trl.core", "trl.assets", "trl.health", "trl.report",
    "trl.doctor",
)  # fmt: skip
PROJECT_PAGES = {"CHANGELOG.md": "changelog", "CONTRIBUTING.md": "contributing", "SECURITY.md": "security"}
PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="(?P<dark>[^"]+)">\s*'
    r'<img alt="(?P<alt>[^"]*)" src="(?P<light>[^"]+)">\s*</picture>'
)
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


# Navigation -----------------------------------------------------------------------------------------------------------


def sections(text: str) -> dict[str, list[str]]:
    """Pages that docs/index.md links to, by the heading above them, in order."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in text.splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ").strip()
        elif re.match(r"\s*([-*]|\d+\.) ", line):
            targets = [target for _, target in LINK.findall(line) if "://" not in target and "#" not in target]
            pages = [_project_page(target.removeprefix("../")) or target for target in targets]
            found.setdefault(heading, []).extend(page for page in pages if page.endswith((".md", ".ipynb")))
    return {heading: pages for heading, pages in found.items() if pages}


def _toctrees(text: str) -> str:
    """Hidden toctrees, one for each section of docs/index.md."""
    trees = []
    for heading, pages in sections(text).items():
        entries = "\n".join(f"/{page.rpartition('.')[0]}" for page in dict.fromkeys(pages))
        entries += "\n/reference/api/index" if heading == "Reference" else ""
        trees.append(f"```{{toctree}}\n:hidden:\n:caption: {heading}\n\n{entries}\n```")
    return "".join(f"\n\n{tree}" for tree in trees) + "\n"


def read_source(app: Sphinx, docname: str, source: list[str]) -> None:
    text = re.sub(r"<!--.*?-->\n?", "", source[0], flags=re.DOTALL)  # markers of scripts and tests
    folder = (DOCS / docname).parent
    text = PICTURE.sub(_images, text)
    if not docname.startswith("project/"):
        text = LINK.sub(lambda link: _link(link, folder), text)
    source[0] = text + (_toctrees(source[0]) if docname == "index" else "")


def _images(picture: re.Match[str]) -> str:
    """The two images of a <picture>: furo shows the one of the colour scheme that the reader has chosen."""
    dark, alt, light = picture["dark"], picture["alt"], picture["light"]
    return "\n\n".join(
        f"```{{image}} {file}\n:alt: {alt}\n:class: only-{scheme}\n```"
        for file, scheme in ((light, "light"), (dark, "dark"))
    )


def _project_page(file: str) -> str | None:
    """Page of the site that a Markdown file of the repository's root becomes."""
    return f"project/{PROJECT_PAGES[file]}.md" if file in PROJECT_PAGES else None


def _link(link: re.Match[str], folder: Path) -> str:
    label, target = link[1], link[2]
    if "://" in target or target.startswith(("#", "mailto:", "/")):
        return link[0]
    name, _, anchor = target.partition("#")
    path = (folder / name).resolve()
    if path == ROOT / "README.md":
        return f"[{label}](/index.md)"
    if path.parent == ROOT and (page := _project_page(path.name)):
        return f"[{label}](/{page}{'#' + anchor if anchor else ''})"
    if path.is_relative_to(DOCS) and folder == ROOT:
        return f"[{label}](/{path.relative_to(DOCS).as_posix()}{'#' + anchor if anchor else ''})"
    return label if path.is_dir() or folder == ROOT else link[0]


# Notebooks ------------------------------------------------------------------------------------------------------------


class NotebookParser(MystParser):
    """Reads a notebook's cells as one Markdown page."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        cells = json.loads(inputstring)["cells"]
        super().parse("\n\n".join(_as_markdown(cell) for cell in cells), document)


def _as_markdown(cell: dict[str, Any]) -> str:
    text = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return text
    outputs = ["".join(output.get("text", "")) for output in cell.get("outputs", [])]
    printed = "".join(f"\n\n```text\n{output.rstrip()}\n```" for output in outputs if output)
    return f"```python\n{text}\n```{printed}"


# Reference ------------------------------------------------------------------------------------------------------------


def write_pages(app: Sphinx) -> None:
    """Writes reference/api/ and project/, which git ignores."""
    pages = {
        f"project/{page}.md": LINK.sub(lambda link: _link(link, ROOT), (ROOT / file).read_text(encoding="utf-8"))
        for file, page in PROJECT_PAGES.items()
    }
    seen: dict[int, str] = {}
    names = [name for name in MODULES if _exists(name)]
    for name in names:
        pages[f"reference/api/{name}.rst"] = _module_page(name, seen)
    tree = "".join(f"   {name}\n" for name in names)
    title = "Classes and functions"
    pages["reference/api/index.rst"] = (
        f"{title}\n{'=' * len(title)}\n\nEvery public name, from its docstring. Settings of training have "
        f"a :doc:`page of their own </reference/settings>`.\n\n.. toctree::\n   :maxdepth: 1\n\n{tree}"
    )
    for page, text in pages.items():
        path = DOCS / page
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _exists(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return False
    return True


def public_names(name: str) -> list[str]:
    """The names that a module declares public."""
    module = importlib.import_module(name)
    if "__all__" in vars(module):
        return [each for each in module.__all__ if not each.startswith("__")]
    return [
        each
        for each, value in vars(module).items()
        if not each.startswith("_") and getattr(value, "__module__", None) == name and callable(value)
    ]


def _module_page(name: str, seen: dict[int, str]) -> str:
    module = importlib.import_module(name)
    lines = [name, "=" * len(name), "", inspect.cleandoc(module.__doc__ or ""), ""]
    for each in public_names(name):
        value = getattr(module, each)
        if id(value) in seen:
            lines += [f"``{name}.{each}``: see :obj:`{seen[id(value)]}`.", ""]
            continue
        described = inspect.isclass(value) or inspect.isroutine(value)
        if described:
            seen[id(value)] = f"{name}.{each}"
        lines += _directive(name, each, value) if described else [f"``{name}.{each}`` = ``{_short(value)}``", ""]
    return "\n".join(lines)


def _short(value: Any) -> str:
    text = re.sub(r"<class '([^']+)'>", r"\1", repr(value)).replace("`", "'")
    return text if len(text) < 200 else text[:200] + " ..."


def _directive(module: str, name: str, value: Any) -> list[str]:
    if not inspect.isclass(value):
        return [f".. autofunction:: {module}.{name}", ""]
    ours = [base.__name__ for base in value.__mro__ if not base.__module__.startswith("trl")]
    return [
        f".. autoclass:: {module}.{name}",
        "   :members:",
        "   :undoc-members:",
        f"   :inherited-members: {', '.join(dict.fromkeys(ours))}",
        "",
    ]


def clean_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are written for people: a star or a bar outside code is no markup."""
    for i, line in enumerate(lines):
        parts = re.split(r"(``.*?``|`[^`]*`)", line)
        lines[i] = "".join(
            part if part.startswith("`") else re.sub(r"([*|]|(?<=\w)_(?=\W|$))", r"\\\1", part) for part in parts
        )


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
    app.connect("builder-inited", write_pages)
    app.connect("source-read", read_source)
    app.connect("autodoc-process-docstring", clean_docstring, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
