"""What the documents say holds: links resolve, tests that are named exist, every statistic is explained."""

from __future__ import annotations

import ast
import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.helpers import tiny_gpt2, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MADE = {"_build", "_ext", "project", "api", ".ipynb_checkpoints"}  # folders that `make docs` writes or reads
SITE = sorted(
    page for page in [*DOCS.glob("**/*.md"), *DOCS.glob("**/*.ipynb")] if not MADE & set(page.relative_to(DOCS).parts)
)
PAGES = sorted([*ROOT.glob("*.md"), *SITE, *ROOT.glob("examples/**/*.md")])
LINK = re.compile(r"""(?:\]\(|src="|srcset=")([^)"\s\\]+)""")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
TEST_NAME = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`|\]\((?:\.\./)*(tests/[\w/]+\.py)\)")


def prose(page: Path) -> str:
    """The text of a page or notebook, without its blocks of code."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as GitHub and MyST make them."""
    found: list[str] = []
    for heading in HEADING.findall(prose(page)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path):
    for target in LINK.findall(prose(page)):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{page.name}: no {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name}: {path or page.name} has no heading #{anchor}"


def test_every_page_is_in_the_navigation_once():
    """The links of docs/index.md are the site's order (docs/_ext/trl_site.py)."""
    links = [target for target in LINK.findall(prose(DOCS / "index.md").split("## Start")[1]) if "://" not in target]
    listed = [(DOCS / target).resolve() for target in links if not target.startswith("../")]
    assert sorted(set(listed)) == [page for page in SITE if page != DOCS / "index.md"]
    assert len(listed) == len(set(listed))


def test_commands_on_the_pages_exist():
    from trl.cli.commands import COMMANDS

    blocks = [
        block
        for page in PAGES
        for block in re.findall(r"```(?:sh|bash)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    ]
    used = {line.split()[1] for block in blocks for line in block.splitlines() if line.startswith("trl ")}
    assert len(used) > 5 and used <= set(COMMANDS), used - set(COMMANDS)


def test_written_parts_are_up_to_date():
    """Settings and metrics on the pages are those of the code: `make docs-tables` writes them."""
    from scripts.docs_tables import pages

    stale = [path.name for path, text in pages().items() if path.read_text(encoding="utf-8") != text]
    assert stale == [], "run make docs-tables"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_tests_that_are_named_exist(page: Path):
    for path, name, linked in TEST_NAME.findall(page.read_text(encoding="utf-8")):
        file = ROOT / (path or linked)
        assert file.exists(), f"{page.name} names {path or linked}"
        if name:
            assert f"def {name}(" in file.read_text(encoding="utf-8"), f"{page.name} names {path}::{name}"


def test_hints_name_the_package_that_is_missing():
    """Where this library was installed from a clone, `pip install 'trl[peft]'` may fetch another project of its name."""
    sources = [path for folder in ("trl", "examples", "scripts", "bench") for path in (ROOT / folder).rglob("*.py")]
    hints = re.compile(r"""pip install(?: -\S+)* ['"]?trl\b""")
    found = [path.name for path in [*PAGES, *sources] if hints.search(path.read_text(encoding="utf-8"))]
    assert found == []


def test_every_departure_names_a_test():
    rows = [
        line
        for line in (ROOT / "docs/departures.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith(("| TRL 0.4.6 |", "| ---"))
    ]
    assert len(rows) >= 14
    for row in rows:
        assert TEST_NAME.search(row.rstrip(" |").rsplit("|", 1)[-1]), f"no test in: {row}"


def test_files_that_the_architecture_names_exist():
    """Each is a path, or a folder and a name, or a name alone: all end the path of some file."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w/]+\.py\b", text))
    files = [
        "/" + path.relative_to(ROOT).as_posix()
        for folder in ("trl", "tests", "bench")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(named) > 20
    assert [name for name in sorted(named) if not any(file.endswith("/" + name) for file in files)] == []


def documented_statistics() -> set[str]:
    text = (ROOT / "docs/ppo.md").read_text(encoding="utf-8")
    return set(re.findall(r"`((?:objective|ppo|tokens|time|memory)/[\w/]+)`", text.split("## Statistics")[1]))


def test_every_statistic_is_explained_and_exists():
    from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model

    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_gpt2())
    config = PPOConfig(batch_size=2, mini_batch_size=2, ppo_epochs=1)
    trainer = PPOTrainer(config, model, create_reference_model(model), tiny_tokenizer())
    queries = [torch.tensor([5, 6]), torch.tensor([7, 8, 9])]
    responses = [torch.tensor([10, 11, 12]), torch.tensor([13, 1])]
    scores = [torch.tensor(1.0), torch.tensor(-1.0)]
    stats = trainer.step(queries, responses, scores, sampler_logprobs=[torch.zeros(3), torch.zeros(2)])
    assert {key for key in stats if isinstance(key, str)} - documented_statistics() == set()
    assert documented_statistics() - set(stats) == set()


def test_the_way_from_step_to_the_loss_is_as_it_is_shown():
    """At most five files, none of them twice; every function exists and names the one that it calls next."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").split("### From step to the loss")[1]
    rows = re.findall(r"^\| `(trl/\S+)` \| (.*) \|$", text.split("An `Algorithm`")[0], re.MULTILINE)
    assert 2 <= len(rows) <= 5 and len({file for file, _ in rows}) == len(rows)
    way = [(file, name) for file, names in rows for name in re.findall(r"`(\w+)`", names)]
    sources = {}
    for file, name in way:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        sources[file, name] = [
            ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name
        ]
        assert sources[file, name], f"{file} has no {name}"
    for here, (_, following) in pairwise(way):
        called = "loss_fn" if following == "loss" else following  # passed as a function
        assert any(re.search(rf"\b(_trl_)?{called}\(", source) for source in sources[here]), (
            f"{here} does not call {following}"
        )
