"""S10: names of runs resolve inside their root."""

from __future__ import annotations

from pathlib import Path

import pytest

from trl.trackers import RunDirectory, run_folder


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "is empty"),
        (".", "is the root itself"),
        ("..", "contains '..'"),
        ("a/../../b", "contains '..'"),
        ("..\\b", "contains '..'"),
        ("/etc", "is absolute"),
        ("C:\\runs", "is absolute"),
        ("a\0b", "control characters"),
        ("a\nb", "control characters"),
        ("a\x1b[31mb", "control characters"),
        ("a\udc80", "control characters"),
        ("x" * 300, "a component of 300 bytes; the maximum is 255"),
        ("é" * 128, "a component of 256 bytes"),
        ("out/run", "through a symbolic link"),
        ("out", "through a symbolic link"),
        ("loop/run", "cannot be resolved"),
    ],
)
def test_names_that_are_refused(tmp_path: Path, name: str, reason: str) -> None:
    root, elsewhere = tmp_path / "runs", tmp_path / "elsewhere"
    root.mkdir()
    elsewhere.mkdir()
    (root / "out").symlink_to(elsewhere)
    (root / "loop").symlink_to(root / "loop")
    before = sorted(tmp_path.rglob("*"))
    for use in (run_folder, RunDirectory.create, RunDirectory.open, RunDirectory.exists):
        with pytest.raises(ValueError, match=reason):
            use(name, root)
    assert sorted(tmp_path.rglob("*")) == before


def test_names_that_are_taken(tmp_path: Path) -> None:
    root = tmp_path / "linked"
    (tmp_path / "runs/inner").mkdir(parents=True)
    root.symlink_to(tmp_path / "runs")
    (tmp_path / "runs/inside").symlink_to(tmp_path / "runs/inner")
    for name in ("polite", "a/b", "..a", "x" * 255, "mit Leerzeichen é"):
        assert run_folder(name, root) == (tmp_path / "runs" / name).resolve()
    assert run_folder("inside/x", root) == (tmp_path / "runs/inner/x").resolve()


def test_without_a_root_any_path_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_folder("a/../b") == (tmp_path / "b").resolve()
    assert run_folder(str(tmp_path)) == tmp_path.resolve()
    for name, reason in (("a\0b", "control characters"), ("x" * 300, "300 bytes"), ("", "empty")):
        with pytest.raises(ValueError, match=reason):
            run_folder(name)


def test_a_run_whose_files_lead_out_of_it_is_not_opened(tmp_path: Path) -> None:
    RunDirectory.create("it", tmp_path / "runs").close()
    metrics, precious = tmp_path / "runs/it/metrics.jsonl", tmp_path / "precious"
    precious.write_text("kept", encoding="utf-8")
    metrics.unlink()
    metrics.symlink_to(precious)
    with pytest.raises(ValueError, match=r"metrics\.jsonl is a symbolic link that leads out of the run folder"):
        RunDirectory.open("it", tmp_path / "runs")
    assert precious.read_text(encoding="utf-8") == "kept"
