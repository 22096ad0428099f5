"""Text as windows: what a window holds, and in which order training sees them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from letters import BOS, Letters

from prosparse.texts import Windows, WindowSet, cut_stream, open_windows, pack


def packed(windows: Iterable[Sequence[int]], path: Path, most: int = 99) -> Windows:
    pack(windows, path, most)
    return open_windows(path, 4)


def test_windows_are_the_stream_in_order(tmp_path: Path) -> None:
    windows = packed(cut_stream(["abcd", "ef", "ghijk"], Letters(), 4), tmp_path / "w")
    text = ["".join(map(chr, window[1:])) for window in windows]
    assert windows[:, 0].tolist() == [BOS] * 4
    assert text == ["abc", "d\x07e", "f\x07g", "hij"]
    assert len(packed(cut_stream(["abcdefghi"], Letters(), 4), tmp_path / "w", 2)) == 2


def test_every_epoch_has_every_window_once(tmp_path: Path) -> None:
    windows = packed([[n] * 4 for n in range(10)], tmp_path / "w")
    order = [
        int(item["input_ids"][0])
        for item in map(WindowSet([(windows, 30)], 3).__getitem__, range(30))
    ]
    epochs = [order[:10], order[10:20], order[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = WindowSet([(windows, 30)], 3)
    assert [int(again[index]["input_ids"][0]) for index in (29, 0, 11)] == [
        order[29],
        order[0],
        order[11],
    ]
