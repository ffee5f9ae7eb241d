"""YAML files: what is refused, with file and line, and never executed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from trl.cli.problems import UsageError
from trl.cli.resolve import Collector
from trl.cli.yaml_nodes import MAX_BYTES, Document


def problems(text: str | bytes, folder: Path) -> str:
    path = folder / "c.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    collector = Collector()
    collector.add_file("c.yaml")
    return str(UsageError(collector.problems))


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("- a\n- b\n", 1, "a configuration is a mapping of names to values, not a list"),
        ("just text\n", 1, "not a value"),
        ("ppo: [1, 2]\n", 1, "ppo is a mapping of names to values, not a list"),
        ("ppo: 3\n", 1, "not a value"),
        ("ppo:\n  seed: 1\n  seed: 2\n", 3, "seed is already given in line 2"),
        ("ppo:\n  seed: 1\nppo:\n  lam: 1\n", 3, "ppo is already given in line 1"),
        ("seed: 1\nppo:\n  seed: 2\n", 3, "ppo.seed is already given in line 1"),
        ("train:\n  output_dir: a\n  run_dir: b\n", 3, "train.run_dir is already given in line 2"),
        ("ppo:\n\tseed: 1\n", 2, "a tab"),
        ("ppo:\n  seed: 1\n \tlam: 1\n", 3, "a tab"),
        ("ppo: {seed: 1\n", 2, "expected ',' or '}'"),
        ("ppo:\n  seed: !!python/object/apply:os.system ['touch fired']\n", 2, "python/object/apply:os.system is not read"),
        ("ppo: !!python/object:builtins.dict {}\n", 1, "is not read"),
        ("reward: !foo x\n", 1, "the tag !foo is not read"),
        ("ppo: &a\n  seed: 1\ntrain: *a\n", 1, "anchors and aliases are not read"),
        ("ppo:\n  <<: {seed: 1}\n", 2, "ppo.<< is no setting"),
        ("? [a, b]\n: 1\n", 1, "a key must be a name"),
        ("seed: 1\n---\nseed: 2\n", 2, "but found another document"),
        ("ppo:\n  seed: 1\x00\n", 2, "the character U+0000 is not allowed"),
        ("ppo:\n  seed: '\x1b[31m'\n", 2, "the character U+001B is not allowed"),
        (b"ppo:\n  task_name: \xff\xfe\n", 2, "not UTF-8"),
        ("nothing:\n", 1, "nothing is no setting"),
        ("5: x\n", 1, "5 is no setting"),
    ],
)  # fmt: skip
def test_refused_with_file_and_line(text: str | bytes, line: int, said: str, tmp_path: Path) -> None:
    message = problems(text, tmp_path)
    assert f"c.yaml:{line}: " in message and said in message
    assert not (tmp_path / "fired").exists()
    assert "\x1b" not in message


@pytest.mark.parametrize(
    "text", ["", "\n\n", "# nothing\n", "ppo:\n", "ppo: {}\n", "ppo: null\ntrain: ~\n", "\ufeffppo: {}\n"]
)
def test_empty_is_fine(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    collector = Collector()
    collector.add_file("c.yaml")
    assert collector.problems == [] and collector.given == {}


def test_a_megabyte_is_a_short_message(tmp_path: Path) -> None:
    message = problems(f"ppo:\n  kl_penalty: {'x' * (MAX_BYTES - 100)}\n", tmp_path)
    assert "c.yaml:2: ppo.kl_penalty" in message and len(message) < 1000
    assert "too long" in problems("x" * (MAX_BYTES + 1), tmp_path)


def test_deep_nesting_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    assert "too deep" in problems("a: " + "[" * 100_000, tmp_path)


@pytest.mark.parametrize("name", ["missing.yaml", ".", "a\x00b"])
def test_what_is_no_file(name: str) -> None:
    with pytest.raises(UsageError, match=r"no such file|embedded null"):
        Document.load(name)


def test_aliases_cannot_multiply(tmp_path: Path) -> None:
    laughs = "a: &a [x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20)
    )
    started = time.monotonic()
    assert "anchors and aliases are not read" in problems(laughs, tmp_path)
    assert time.monotonic() - started < 60  # without the check it would not end
