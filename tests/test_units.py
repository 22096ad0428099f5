"""Bytes as people read them."""

from __future__ import annotations

import pytest

from common.units import GIB, size


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1536, "1.5 KiB"),
        (200 << 20, "200 MiB"),
        (5000 * GIB, "5,000 GiB"),
    ],
)
def test_sizes(number: int, text: str) -> None:
    assert size(number) == text
