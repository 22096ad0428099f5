"""Who makes which item of some work: order, deaths, stragglers, and how much is in hand."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from cluster.backlog import Backlog, Entry


def taken(backlog: Backlog[str, str], worker: str, now: float = 0.0) -> Entry[str]:
    entry = backlog.next(worker, now)
    assert entry is not None
    return entry


def test_items_are_taken_as_they_are_needed_and_given_out_as_they_are_made() -> None:
    asked = []

    def items() -> Iterator[str]:
        for name in "abc":
            asked.append(name)
            yield name

    backlog: Backlog[str, str] = Backlog(items(), ordered=False, ahead=0)
    first, second = taken(backlog, "one"), taken(backlog, "two")
    assert asked == ["a", "b", "c"]  # one more than was handed out
    assert backlog.made(second, "two", "B", 1.0)
    assert list(backlog.given_out()) == [(1, "b", "B")]
    third = taken(backlog, "two")
    assert backlog.next("three", 0.0) is None
    assert not backlog.finished
    assert backlog.made(third, "two", "C", 1.0)
    assert backlog.made(first, "one", "A", 1.0)
    assert [made for _, _, made in backlog.given_out()] == ["C", "A"]
    assert backlog.finished


def test_no_items_are_finished_at_once() -> None:
    assert Backlog((), ordered=True, ahead=1).finished


def test_in_order_no_more_is_in_hand_than_was_allowed() -> None:
    backlog: Backlog[int, int] = Backlog(iter(range(100)), ordered=True, ahead=3)
    entries = [backlog.next(f"worker {n}", 0.0) for n in range(5)]
    held = [entry for entry in entries if entry is not None]
    assert [entry.number for entry in held] == [0, 1, 2]
    backlog.made(held[2], "worker 2", 2, 1.0)
    assert list(backlog.given_out()) == []
    assert backlog.next("worker 2", 1.0) is None
    backlog.made(held[0], "worker 0", 0, 1.0)
    assert [number for number, _, _ in backlog.given_out()] == [0]
    following = backlog.next("worker 0", 1.0)
    assert following is not None
    assert following.number == 3


def test_what_a_dead_worker_was_at_is_handed_out_again_first() -> None:
    backlog: Backlog[str, str] = Backlog("abc", ordered=False, ahead=0)
    lost = taken(backlog, "one")
    backlog.lost(lost, "one")
    again = taken(backlog, "two")
    assert (again, again.deaths) == (lost, 1)
    assert backlog.made(again, "two", "A", 1.0)
    assert list(backlog.given_out()) == [(0, "a", "A")]


def test_an_item_that_takes_long_goes_to_a_second_worker_and_the_first_result_counts() -> None:
    backlog: Backlog[str, str] = Backlog("abc", ordered=False, ahead=0)
    slow = taken(backlog, "slow")
    for _ in range(2):
        backlog.made(taken(backlog, "quick", 0.0), "quick", "x", 10.0)
    assert backlog.next("quick", 14.0) is None  # not so slow yet
    copy = taken(backlog, "quick", 16.0)
    assert copy is slow
    assert backlog.next("third", 30.0) is None  # two are enough
    assert backlog.made(copy, "quick", "quick", 20.0)
    assert not backlog.made(slow, "slow", "slow", 21.0)
    assert [made for _, _, made in backlog.given_out()] == ["x", "x", "quick"]
    assert backlog.finished


def test_a_death_of_one_of_two_copies_costs_nothing() -> None:
    backlog: Backlog[str, str] = Backlog("ab", ordered=False, ahead=0)
    slow = taken(backlog, "slow")
    backlog.made(taken(backlog, "quick", 0.0), "quick", "B", 1.0)
    copy = taken(backlog, "quick", 9.0)
    backlog.lost(copy, "quick")
    backlog.made(slow, "slow", "A", 12.0)
    list(backlog.given_out())
    assert backlog.finished


def test_items_of_one_kind_are_not_slow_for_taking_longer_than_another_kind() -> None:
    backlog: Backlog[object, int] = Backlog(["weights", 1, 2], ordered=False, ahead=0)
    quick = backlog.next("one", 0.0)
    assert quick is not None
    backlog.made(quick, "one", 0, 0.1)
    assert backlog.next("one", 0.1) is not None
    assert backlog.next("two", 0.1) is not None
    assert backlog.next("three", 50.0) is None


@pytest.mark.parametrize("ordered", [False, True])
def test_every_item_comes_out_once_whatever_happens(ordered: bool) -> None:
    for seed in range(50):
        chosen = random.Random(seed)
        backlog: Backlog[int, int] = Backlog(range(30), ordered=ordered, ahead=7)
        busy: dict[str, Entry[int]] = {}
        found: list[int] = []
        now = 0.0
        while not backlog.finished:
            now += chosen.random()
            for worker in "abcd":
                if worker not in busy and (entry := backlog.next(worker, now)) is not None:
                    busy[worker] = entry
            worker = chosen.choice(list(busy))
            entry = busy.pop(worker)
            if chosen.random() < 0.3:
                backlog.lost(entry, worker)
            else:
                backlog.made(entry, worker, entry.item**2, now)
            found += [made for _, _, made in backlog.given_out()]
        expected = [number**2 for number in range(30)]
        assert (found if ordered else sorted(found)) == expected
