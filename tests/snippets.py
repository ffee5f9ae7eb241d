"""Python snippets of the pages, run as a reader would run them.

Each page is a program: its ```python blocks run in order, in one namespace, in an empty directory in which the hub names that
pages use are folders with the embedded models. A block whose first line is a comment with a file name, `# my_rewards.py`, is
written to that file and not run. An HTML comment on the line above a block may say more; several such lines add up:

    <!-- snippet: steps=2 batch_size=8 -->        other numbers for these settings, so that the run is short
    <!-- snippet: replace `a` with `b` -->        other code
    <!-- snippet: needs trainer, prompts -->      names from SETUPS, as if the page had defined them
    <!-- snippet: raises ValueError -->           the block ends in this error
    <!-- snippet: fresh -->                       a new namespace
    <!-- snippet: shared -->                      each later block runs in a folder of its own, with only this block's names
    <!-- snippet: after Train with LoRA -->       and with the names and runs of the block under that heading
    <!-- snippet: slow -->                        run by `make slow` alone, with the rest of its page
    <!-- snippet: not run: needs a GPU -->        compiled only; the reason is required
"""

from __future__ import annotations

import builtins
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trl.assets

ROOT = Path(__file__).resolve().parents[1]
MARK = "<!-- snippet: "
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Hub names on the pages, and the embedded model that stands in for each.
STAND_INS: dict[str, trl.assets.Name] = {
    "gpt2": "tiny-gpt2-reviews",
    "Qwen/Qwen2.5-0.5B-Instruct": "tiny-gpt2-reviews",
    "lvwerra/distilbert-imdb": "tiny-bert-sentiment",
}
# Warnings that follow from runs as short as these; all others are errors.
QUIET = ("objective/kl is",)


@dataclass(frozen=True, slots=True)
class Snippet:
    """A block of Python on a page."""

    page: Path
    line: int  # of the first line of code
    code: str
    marks: tuple[str, ...]
    heading: str = ""  # the nearest one above

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"

    @property
    def slow(self) -> bool:
        return "slow" in self.marks

    @property
    def not_run(self) -> str | None:
        """Why the block is not run; None if it is."""
        return next((m.partition(":")[2].strip() for m in self.marks if m.startswith("not run")), None)

    @property
    def file(self) -> str | None:
        """Name of the file that the block is."""
        found = re.match(r"# (\w+\.py)\n", self.code)
        return found[1] if found else None

    @property
    def needs(self) -> list[str]:
        return [name.strip() for m in self.marks if m.startswith("needs ") for name in m[6:].split(",")]

    @property
    def after(self) -> list[str]:
        return [m[6:] for m in self.marks if m.startswith("after ")]

    @property
    def raises(self) -> type[BaseException] | None:
        names = [m.split()[1] for m in self.marks if m.startswith("raises ")]
        return getattr(builtins, names[0]) if names else None

    def changed(self) -> str:
        """The code with the replacements of its marks, each of which must apply."""
        code = self.code
        for mark in self.marks:
            if found := re.fullmatch(r"replace `(.+)` with `(.*)`", mark):
                assert found[1] in code, f"{self.where}: no {found[1]!r} to replace"
                code = code.replace(found[1], found[2])
            elif re.fullmatch(r"(\w+=\S+ ?)+", mark):
                for name, value in (part.split("=", 1) for part in mark.split()):
                    code, count = re.subn(rf"""(\b{name}['"]?(?:=|: ))[\d.e-]+""", rf"\g<1>{value}", code)
                    assert count, f"{self.where}: no {name}= to change"
            else:
                known = mark in ("slow", "fresh", "shared") or mark.startswith(
                    ("needs ", "after ", "raises ", "not run: ")
                )
                assert known, f"{self.where}: {mark!r} is no mark"
        return code


def snippets(page: Path) -> list[Snippet]:
    """The Python blocks of a page, or the cells of a notebook."""
    if page.suffix == ".ipynb":
        cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
        return [
            Snippet(page, number, "".join(cell["source"]), ())
            for number, cell in enumerate(cells)
            if cell["cell_type"] == "code"
        ]
    lines = page.read_text(encoding="utf-8").splitlines()
    found, marks, start, heading = [], [], None, ""
    for number, line in enumerate(lines, 1):
        if start is None and line.strip() == "```python":
            start = number + 1
        elif start is not None and line.strip() == "```":
            code = "\n".join(lines[start - 1 : number - 1]) + "\n"
            found.append(Snippet(page, start, code, tuple(marks), heading))
            marks, start = [], None
        elif start is None and line.startswith(MARK):
            marks.append(line.removeprefix(MARK).removesuffix("-->").strip())
        elif start is None:
            assert not marks, f"{page.name}:{number}: a mark without a ```python block below it"
            if line.startswith("#"):
                heading = line.lstrip("#").strip()
    return found


def run_page(page: Path, folder: Path, *, slow: bool = False) -> dict[str, Any]:
    """Runs the snippets of a page in `folder`, the current directory, and returns its names.

    Args:
        page: a Markdown page.
        folder: an empty directory; modules in it can be imported.
        slow: whether to run the blocks that are marked slow.
    """
    make_stand_ins(folder)
    names: dict[str, Any] = {"__name__": "page"}
    shared: dict[str, Any] | None = None
    done: dict[str, tuple[dict[str, Any], Path]] = {}  # the names and folder of each block after a shared one
    for snippet in snippets(page):
        code = snippet.changed()
        compiled = compile(code, snippet.where, "exec")
        if snippet.not_run is not None or (snippet.slow and not slow):
            continue
        if "fresh" in snippet.marks:
            names = {"__name__": "page"}
        if shared is not None:
            names, place = dict(shared), folder / f"block-{snippet.line}"
            _start_alone(names, place, [done[heading] for heading in snippet.after])
            done[snippet.heading] = (names, place)
        if snippet.file is not None:
            (folder / snippet.file).write_text(code, encoding="utf-8")
            continue
        for name in snippet.needs:
            names[name] = SETUPS[name](names)
        _execute(compiled, names, snippet)
        if "shared" in snippet.marks:
            shared = names
    return names


def _start_alone(names: dict[str, Any], place: Path, earlier: list[tuple[dict[str, Any], Path]]) -> None:
    """Makes `place` the current directory, with the names and the runs of earlier blocks alone."""
    make_stand_ins(place)
    for their_names, their_place in earlier:
        names.update(their_names)
        shutil.copytree(their_place / "runs", place / "runs", dirs_exist_ok=True)
    os.chdir(place)


def _execute(compiled: Any, names: dict[str, Any], snippet: Snippet) -> None:
    with warnings.catch_warnings():
        for message in QUIET:
            warnings.filterwarnings("ignore", message)
        try:
            exec(compiled, names)
        except BaseException as error:
            if snippet.raises is None or not isinstance(error, snippet.raises):
                raise
        else:
            assert snippet.raises is None, f"{snippet.where} should raise {snippet.raises}"


# Setups ---------------------------------------------------------------------------------------------------------------


def make_stand_ins(folder: Path) -> None:
    """Makes a folder of the embedded model under each hub name; chat models get a template."""
    for name, embedded in STAND_INS.items():
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        for file in Path(trl.assets.path(embedded)).iterdir():
            if not (target / file.name).exists():
                (target / file.name).symlink_to(file)
        if "Instruct" in name:
            (target / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _folder() -> str:
    return trl.assets.path("tiny-gpt2-reviews")


def _tokenizer(names: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_folder())


def _model(names: dict[str, Any]) -> Any:
    from trl import AutoModelForCausalLMWithValueHead

    return AutoModelForCausalLMWithValueHead.from_pretrained(_folder())


def _config(names: dict[str, Any]) -> Any:
    from trl import PPOConfig

    return PPOConfig(batch_size=4, mini_batch_size=4, ppo_epochs=1, learning_rate=1e-4)


def _trainer(names: dict[str, Any]) -> Any:
    from trl import PPOTrainer

    return PPOTrainer(_config(names), _model(names), tokenizer=_tokenizer(names))


def _reward(names: dict[str, Any]) -> Callable[..., Sequence[float]]:
    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        return [float("good" in text) for text in completions]

    return reward


SETUPS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "tokenizer": _tokenizer,
    "model": _model,
    "config": _config,
    "trainer": _trainer,
    "reward": _reward,
    "prompts": lambda names: trl.assets.prompts()[:8],
    "ref_model": _model,
    "total_steps": lambda names: 10,
}
