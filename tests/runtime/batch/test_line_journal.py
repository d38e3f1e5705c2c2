"""The journal: what was finished is there after any end, once, and nothing else is."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_onnx.runtime.batch import line_journal
from llama_onnx.runtime.batch.line_journal import began_with_force, open_journal
from llama_onnx.targets.errors import ResourceError, UsageError

WORK = {"work": "test", "input": "abc"}


def content(number: int) -> bytes:
    return b'{"n": %d}' % number


def test_parts_come_back_in_order(tmp_path: Path) -> None:
    with open_journal(tmp_path / "j", WORK, 4) as journal:
        for number in (2, 0, 3):
            assert journal.add(number, content(number))
        assert not journal.add(2, b"another")
    with open_journal(tmp_path / "j", WORK, 4) as journal:
        assert list(journal.done) == [1, 0, 1, 1] and journal.finished == 3
        assert list(journal.contents()) == [content(0), content(2), content(3)]
        assert journal.add(1, content(1))
        assert list(journal.contents()) == [content(number) for number in range(4)]


@given(cut=st.integers(0, 200), flip=st.booleans())
def test_a_cut_or_damaged_end_costs_only_what_follows(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "journal"
    path.unlink(missing_ok=True)
    with open_journal(path, WORK, 6) as journal:
        start = path.stat().st_size
        ends = [start]
        for number in range(6):
            journal.add(number, content(number))
            ends.append(path.stat().st_size)
    whole = path.read_bytes()
    at = min(start + cut, len(whole) - 1)
    damaged = whole[:at] + (bytes([whole[at] ^ 1]) + whole[at + 1 :] if flip else b"")
    path.write_bytes(damaged)
    sound = sum(end <= at for end in ends[1:])
    with open_journal(path, WORK, 6) as journal:
        assert list(journal.contents()) == [content(number) for number in range(sound)]
        for number in range(sound, 6):
            assert journal.add(number, content(number))
    assert path.read_bytes() == whole


def test_other_work_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with open_journal(path, WORK, 2) as journal:
        journal.add(0, content(0))
    with (
        pytest.raises(UsageError, match=r"input changed since it was begun.*--force"),
        open_journal(path, {**WORK, "input": "other"}, 2),
    ):
        pass
    with open_journal(path, {**WORK, "input": "other"}, 2, force=True) as journal:
        assert journal.finished == 0


def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(b"my notes\n")
    with pytest.raises(UsageError, match="is not a journal"), open_journal(path, WORK, 2):
        pass
    assert path.read_bytes() == b"my notes\n"


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        open_journal(tmp_path / "j", WORK, 2),
        pytest.raises(UsageError, match="another process writes"),
        open_journal(tmp_path / "j", WORK, 2),
    ):
        pass


def test_a_full_disk_is_one_sentence_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "j"
    written = line_journal._write

    def some(file: Any, data: bytes) -> None:
        written(file, data[:5])  # as much as there was room for
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with open_journal(path, WORK, 3) as journal:
        journal.add(0, content(0))
        monkeypatch.setattr(line_journal, "_write", some)
        with pytest.raises(ResourceError, match=r"disk is full: free some space; .* .1. are kept"):
            journal.add(1, content(1))
        monkeypatch.undo()
    with open_journal(path, WORK, 3) as journal:
        assert list(journal.contents()) == [content(0)]
        journal.add(1, content(1))
        assert list(journal.contents()) == [content(0), content(1)]

    monkeypatch.setattr(line_journal, "_write", some)
    with (
        pytest.raises(ResourceError, match="disk is full"),
        open_journal(tmp_path / "new", WORK, 3),
    ):
        pass
    monkeypatch.undo()
    with open_journal(tmp_path / "new", WORK, 3) as journal:  # nothing of the cut header is left
        journal.over = True


def test_work_that_may_replace_a_file_says_so_to_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "j"
    assert not began_with_force(path)
    for force in (False, True):
        with open_journal(path, WORK, 3, force=force) as journal:
            journal.add(0, content(0))
        assert began_with_force(path) is force
    with open_journal(path, WORK, 3) as journal:
        assert journal.finished == 1
    assert began_with_force(path)
