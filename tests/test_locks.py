"""Who may work in a folder, seen from this process, its children and another."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from tests.other_process import held_elsewhere, is_free_elsewhere
from trivium import locks


def test_a_lock_that_another_process_holds_is_not_ours_until_that_process_is_killed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with held_elsewhere(lock) as other:
        with locks.held(lock) as alone:
            assert not alone
        other.kill()
        with locks.held(lock, wait=True) as alone:
            assert alone and not is_free_elsewhere(lock)


def test_blocks_inside_have_the_same_lock_and_do_not_end_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with locks.held(lock):
        with locks.held(lock) as alone:
            assert alone
        assert not is_free_elsewhere(lock)
    assert is_free_elsewhere(lock)


def test_a_child_that_outlives_it_holds_nothing(tmp_path: Path) -> None:
    lock, forked = tmp_path / "lock", multiprocessing.get_context("fork")
    with locks.held(lock):
        child = forked.Process(target=forked.Event().wait)
        child.start()
    assert is_free_elsewhere(lock)
    child.kill()
    child.join()


def test_where_the_file_cannot_be_opened_it_is_as_if_nobody_were_there(tmp_path: Path) -> None:
    with locks.held(tmp_path / "no folder" / "lock") as alone:
        assert alone
