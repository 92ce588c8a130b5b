"""A run folder is followed while it is written: every step and finding once, and no part that is complete again."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.diagnose_cases import FALLING, course
from helpers.full_disk import full_disk
from helpers.run_cases import run

from gradprobe.diagnosis.diagnose import diagnose
from gradprobe.log import RunWriter, formats, writer
from gradprobe.log.follower import News, RunFollower
from gradprobe.snapshot import Snapshot

pytestmark = pytest.mark.usefixtures("_format")


def values(one: Snapshot | None) -> tuple[object, ...]:
    """Returns what the follower reads of a step, comparable."""
    assert one is not None
    updates = one.parameter_updates
    assert updates is not None
    arrays = (one.rows, one.measured.present, one.measured.numels, updates.weight_rows, updates.update_rows)
    return one.step, one.loss, one.provenance, one.table, updates.names, *(array.tobytes() for array in arrays)


def points(snapshots: list[Snapshot]) -> list[tuple[int, float | None, float]]:
    return [(one.step, one.loss, one.total_norm) for one in snapshots]


def count_opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Returns the list to which the parts are added that are read from now on."""
    opened: list[Path] = []

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def read(self: Any, path: Path, *given: Any) -> Any:
            opened.append(path)
            return original(self, path, *given)

        return read

    for kind in (formats.JsonLines, formats.Parquet):
        for name in ("read_new", "read_last"):
            monkeypatch.setattr(kind, name, counted(getattr(kind, name)))
    return opened


def test_each_look_gives_what_is_new(tmp_path: Path) -> None:
    folder, history = tmp_path / "run", run(7)
    follower = RunFollower(folder)
    assert follower.look() == News()
    with RunWriter(folder, {"every": 1}) as written:
        assert (follower.look(), follower.sessions[-1]["every"]) == (News(), 1)
        for first, stop in ((0, 1), (1, 4), (4, 7)):
            written.write(history[first:stop])
            news = follower.look()
            assert news.steps == points(history[first:stop])
            assert values(news.newest) == values(history[stop - 1])
            assert follower.look() == News()
        for finding in diagnose(course([float("nan")] * 30)):
            written.tell(finding)
            assert repr(follower.look().findings) == repr(((0, finding),))
        assert "ended" not in follower.sessions[-1]
    follower.look()
    assert str(follower.sessions[-1]["ended"]).startswith("20")
    assert follower.stored_at is not None


def test_a_later_session_and_a_new_run_in_the_folder_are_told(tmp_path: Path) -> None:
    folder, history = tmp_path / "run", run(6)
    follower = RunFollower(folder)
    for session, first in enumerate((0, 3)):
        with RunWriter(folder, {"try": session}) as written:
            written.write(history[first:])
    news = follower.look()
    assert news.sessions == {0: 0, 6: 1}
    assert [session["try"] for session in follower.sessions] == [0, 1]
    assert [step for step, *_ in news.steps] == [0, 1, 2, 3, 4, 5, 3, 4, 5]
    RunWriter(folder).close()  # a session without steps
    assert (follower.look(), "ended" in follower.sessions[-1]) == (News(), True)

    shutil.rmtree(folder)
    assert follower.look() == News(is_other=True)
    with RunWriter(folder) as written:
        written.write(history[:2])
    assert follower.look().steps == points(history[:2])
    folder.rename(tmp_path / "old")
    with RunWriter(folder) as written:
        written.write(history[:3])
    news = follower.look()
    assert (news.is_other, news.steps) == (True, points(history[:3]))


def test_a_model_that_changes_is_followed(tmp_path: Path) -> None:
    small, large = run(3, n_weights=4), run(6, n_weights=9)[3:]
    follower = RunFollower(tmp_path / "run")
    with RunWriter(tmp_path / "run") as written:
        for batch in (small, large):
            written.write(batch)
            assert values(follower.look().newest) == values(batch[-1])


@pytest.mark.parametrize("chunk", [1, 100, 2**20])
def test_the_end_of_a_file_is_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(formats, "_CHUNK", chunk)
    with RunWriter(tmp_path / "run") as written:
        written.write(run(5))
    (part,) = (tmp_path / "run" / "steps").iterdir()
    reader = formats.format_of(part)
    assert list(reader.read(part, ["step"])["step"]) == [0, 1, 2, 3, 4]
    for n in range(7):
        assert list(reader.read_last(part, ["step"], n)["step"]) == [0, 1, 2, 3, 4][max(0, 5 - n) :]


def test_complete_parts_are_never_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_PART_ROWS", 10)
    opened = count_opened(monkeypatch)
    follower, seen = RunFollower(tmp_path / "run"), []
    history = run(60)
    with RunWriter(tmp_path / "run") as written:
        for first in range(0, 60, 2):
            written.write(history[first : first + 2])
            before = len(opened)
            seen += [step for step, *_ in follower.look().steps]
            assert len(opened) - before <= 4, f"files opened at step {first}"
            follower.look()
            assert len(opened) - before <= 4, "nothing is new, yet a file was opened"
    assert seen == list(range(60))
    assert len({path for path in opened if path.parent.name == "steps"}) == 6
    assert max(Counter(opened).values()) <= 6  # a part of `steps` is written five times, and looked at once more


def test_steps_that_are_written_during_a_look_are_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_PART_ROWS", 4)
    history = run(30)
    rest = [history[first : first + 2] for first in range(2, 30, 2)]
    with RunWriter(tmp_path / "run") as written:
        written.write(history[:2])
        follower = RunFollower(tmp_path / "run")
        seen: list[tuple[int, float | None, float]] = []

        def then_more(original: Callable[..., Any]) -> Callable[..., Any]:
            def read(*given: Any) -> Any:
                found = original(*given)
                for _ in range(3):
                    if rest:
                        written.write(rest.pop(0))  # completes the part that was just read, and begins others
                return found

            return read

        for kind in (formats.JsonLines, formats.Parquet):
            monkeypatch.setattr(kind, "read_new", then_more(kind.read_new))
        while rest:
            seen += follower.look().steps
        seen += follower.look().steps
    assert seen == points(history)


def test_a_writer_at_work_is_followed_without_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_PART_ROWS", 30)
    history = run(60, n_weights=3)

    def work() -> None:
        with RunWriter(tmp_path / "run") as written:
            for first in range(0, 60, 4):
                written.write(history[first : first + 4])

    follower = RunFollower(tmp_path / "run")
    seen: list[tuple[int, float | None, float]] = []
    newest: Snapshot | None = None
    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive() or "ended" not in (follower.sessions or [{}])[-1]:
        news = follower.look()
        seen += news.steps
        newest = news.newest or newest
    assert seen == points(history)
    assert values(newest) == values(history[-1])


def test_a_log_that_is_switched_off_says_why(tmp_path: Path) -> None:
    follower = RunFollower(tmp_path / "run")
    written = RunWriter(tmp_path / "run")
    written.write(course(FALLING))
    written.close("OSError: the disk is full")
    written.close()
    follower.look()
    assert follower.sessions[-1]["fault"] == "OSError: the disk is full"
    RunWriter(tmp_path / "run").close()  # the folder is free


def test_a_full_disk_does_not_keep_the_folder_from_closing(tmp_path: Path) -> None:
    written = RunWriter(tmp_path / "run")
    with full_disk(10):
        written.close()
    follower = RunFollower(tmp_path / "run")
    follower.look()
    assert "ended" not in follower.sessions[-1]
    RunWriter(tmp_path / "run").close()
