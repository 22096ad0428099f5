"""A minute of `benchmarks.soak` in a few seconds: the same code, at fixed places of its chance."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from conftest import TEXT

from benchmarks.soak_deeds import Soak
from benchmarks.soak_writers import Workshop


@pytest.fixture(scope="module")
def soak(narrow_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Soak:
    """What breaks the writing of thresholds that are chosen again."""
    work = tmp_path_factory.mktemp("soak")
    (work / "text.txt").write_text(TEXT * 40)
    shop = Workshop(str(narrow_model), str(work / "text.txt"), work)
    writers = shop.writers(["train-predictor --resume"])
    return Soak(writers, random.Random(1), mounts=False)


def test_nothing_is_lost_whatever_happens(soak: Soak) -> None:
    for _ in range(3):
        soak.kill()
    soak.set_back()
    soak.collide()
    soak.fill()
    assert soak.counts["killed"] + soak.counts["ended before"] == 4
    assert not soak.wrong


def test_flipped_bits_are_noticed(soak: Soak) -> None:
    soak.flip()
    assert soak.counts["bits flipped"] == 20
    assert not soak.wrong


def test_what_is_lost_or_changed_is_told(soak: Soak, monkeypatch: pytest.MonkeyPatch) -> None:
    each = soak._every[0]
    whole = soak._whole[each.name]
    monkeypatch.setattr(soak, "_every", [each])
    monkeypatch.setitem(soak._whole, each.name, {name: b"" for name in whole})
    monkeypatch.setattr(soak, "wrong", [])
    soak.collide()
    soak.kill()
    assert {line.split(": ")[-1] for line in soak.wrong} >= {"damaged", "went on to something else"}
