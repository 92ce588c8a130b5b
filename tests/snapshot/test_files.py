"""Exports are written whole or not at all: whatever fails, the old files stay and no temporary file is left."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.full_disk import full_disk

from gradprobe.errors import StoreError
from gradprobe.snapshot.files import create_folder, write_files

PARTS = ["head\n", "x" * 100_000, b"\x00tail"]
WHOLE = b"head\n" + b"x" * 100_000 + b"\x00tail"


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def interrupted() -> Iterator[str]:
    yield "half"
    raise KeyboardInterrupt


def test_a_file_holds_its_parts_and_replaces_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "export"
    for _ in range(2):
        write_files({path: PARTS})
        assert path.read_bytes() == WHOLE
        path.write_text("older and much longer" * 10_000)
    assert names(tmp_path) == ["export"]


def test_a_full_disk_leaves_all_old_files(tmp_path: Path) -> None:
    (tmp_path / "first").write_text("old")
    (tmp_path / "third").write_text("old")
    contents = {tmp_path / "first": ["new"], tmp_path / "second": ["new"], tmp_path / "third": PARTS}
    with full_disk(50_000), pytest.raises(StoreError, match="third: cannot write this file: File too large"):
        write_files(contents)
    assert names(tmp_path) == ["first", "third"]
    assert (tmp_path / "first").read_text() == (tmp_path / "third").read_text() == "old"


def test_an_interrupted_export_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "export").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_files({tmp_path / "export": interrupted()})
    with pytest.raises(KeyboardInterrupt):
        write_files({tmp_path / "new": interrupted()}, new=True)
    assert names(tmp_path) == ["export"]
    assert (tmp_path / "export").read_text() == "old"


def test_contents_that_cannot_be_read_are_not_called_unwritable(tmp_path: Path) -> None:
    def damaged() -> Iterator[str]:
        yield "half"
        raise StoreError("run.sqlite: the file is damaged")

    with pytest.raises(StoreError, match=r"^run\.sqlite: the file is damaged$"):
        write_files({tmp_path / "export": damaged()})
    assert names(tmp_path) == []


def test_a_new_file_is_never_written_over_another(tmp_path: Path) -> None:
    path = tmp_path / "export"
    with full_disk(50_000), pytest.raises(StoreError, match="File too large"):
        write_files({path: PARTS}, new=True)
    assert names(tmp_path) == []
    write_files({path: PARTS}, new=True)
    with pytest.raises(StoreError, match="needed a file that does not exist yet, found one"):
        write_files({path: ["other"]}, new=True)
    assert path.read_bytes() == WHOLE
    assert names(tmp_path) == ["export"]


def test_a_new_file_claims_its_name_while_it_is_written(tmp_path: Path) -> None:
    def slow() -> Iterator[str]:
        yield "first"
        with pytest.raises(StoreError, match="does not exist yet"):
            write_files({tmp_path / "export": ["second"]}, new=True)

    write_files({tmp_path / "export": slow()}, new=True)
    assert (tmp_path / "export").read_text() == "first"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/export", "No such file or directory"),
        ("file/export", "Not a directory"),
        ("folder", "Is a directory"),
        ("n" * 300, "File name too long"),
        ("a\0b", "null (byte|character)"),
    ],
    ids=["missing-folder", "file-as-folder", "folder", "long-name", "nul"],
)
@pytest.mark.parametrize("new", [False, True], ids=["replace", "new"])
def test_an_unusable_target_is_one_clear_error(tmp_path: Path, name: str, reason: str, new: bool) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match=reason) as raised:
        write_files({tmp_path / name: ["text"]}, new=new)
    assert str(raised.value).startswith(str(tmp_path / name))
    assert names(tmp_path) == ["file", "folder"]
    assert names(tmp_path / "folder") == []


def test_a_file_that_may_not_be_written_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "export"
    path.write_text("old")
    path.chmod(0o444)
    if os.access(path, os.W_OK):  # the superuser may write everything
        monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(StoreError, match="cannot write this file: Permission denied"):
        write_files({path: ["new"]})
    assert path.read_text() == "old"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc, a folder that nobody can write to")
def test_a_folder_without_permission_is_one_clear_error() -> None:
    with pytest.raises(StoreError, match="/proc/export: cannot write this file"):
        write_files({Path("/proc/export"): ["text"]})
    with pytest.raises(StoreError, match="/proc/folder: cannot write in this folder"):
        create_folder(Path("/proc/folder"))


@pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")
def test_permissions_and_links_stay(tmp_path: Path) -> None:
    private, link = tmp_path / "private", tmp_path / "link"
    private.write_text("old")
    private.chmod(0o600)
    link.symlink_to("private")
    write_files({link: ["new"], tmp_path / "plain": ["new"]})
    assert link.is_symlink()
    assert private.read_text() == "new"
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    (tmp_path / "ordinary").touch()
    assert (tmp_path / "plain").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_or_a_device_is_written_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    write_files({pipe: ["text"]})
    reader.join()
    assert received == [b"text"]
    assert pipe.is_fifo()
    if Path("/dev/full").exists():
        with pytest.raises(StoreError, match="/dev/full: cannot write this file: No space left on device"):
            write_files({Path("/dev/full"): ["text"]})


def test_a_name_that_utf8_cannot_represent_is_spelled_out(tmp_path: Path) -> None:
    write_files({tmp_path / "export": ["a\ud800b"]})
    assert (tmp_path / "export").read_text() == "a\\ud800b"
