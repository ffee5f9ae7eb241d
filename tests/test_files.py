"""Files that are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.disks import Disk, Stopped, use
from trl import files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.json"
    files.write_atomic(target, b"old")
    with monkeypatch.context() as patch:
        log = use(patch, Disk()).log
        files.write_atomic(target, b"new" * 1000)
    assert [name for name, _ in log] == ["write", "fsync", "replace", "fsync"]
    for stop in range(len(log)):
        files.write_atomic(target, b"old")
        with monkeypatch.context() as patch:
            disk = use(patch, Disk(stop_after=stop))
            with pytest.raises(Stopped):
                files.write_atomic(target, b"new" * 1000)
        disk.lose_power()
        assert target.read_bytes() == (b"old" if stop < 3 else b"new" * 1000)


@pytest.mark.parametrize("disk", [Disk(full_after=0), Disk(read_only=True)])
def test_a_failed_write_names_the_file_and_leaves_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk
) -> None:
    target = tmp_path / "x.json"
    files.write_atomic(target, b"old")
    with monkeypatch.context() as patch:
        use(patch, disk)
        with pytest.raises(OSError, match=r"x\.json"):
            files.write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    if not disk.read_only:
        assert list(tmp_path.iterdir()) == [target]


def test_pieces_of_any_size_are_written_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the system takes fewer bytes than it was given."""
    import hashlib
    import os

    class Slow(Disk):
        def _watched(self, name: str):
            call = super()._watched(name)
            return (lambda file, data: call(file, data[:7])) if name == "write" else call

    use(monkeypatch, Slow())
    data = os.urandom(1000)
    size, digest = files.write_file(tmp_path / "x", [data[:0], memoryview(data)[:13], data[13:]])
    assert (tmp_path / "x").read_bytes() == data
    assert (size, digest) == (1000, hashlib.sha256(data).hexdigest()) == (1000, files.sha256_of(tmp_path / "x"))
    files.append_line(tmp_path / "lines", "a line that is long")
    assert (tmp_path / "lines").read_text() == "a line that is long\n"
    with pytest.raises(FileExistsError):
        files.write_file(tmp_path / "x", [])


def test_lines_are_added_and_are_lines(tmp_path: Path) -> None:
    for text in ("one", "zwölf"):
        files.append_line(tmp_path / "x.jsonl", text)
    assert (tmp_path / "x.jsonl").read_text(encoding="utf-8") == "one\nzwölf\n"
    with pytest.raises(ValueError, match="one line is expected, not 2"):
        files.append_line(tmp_path / "x.jsonl", "a\nb")


def test_removal_does_not_follow_links(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    (tmp_path / "gone" / "inner").mkdir(parents=True)
    (tmp_path / "gone" / "inner" / "link").symlink_to(tmp_path / "kept")
    files.remove(tmp_path / "gone")
    assert [p.name for p in tmp_path.rglob("*")] == ["kept", "file"]
