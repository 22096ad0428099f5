"""A tokenizer that can be read off."""

from __future__ import annotations

BOS = 7


class Letters:
    """A tokenizer whose tokens are code points."""

    byte_level = False

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def bos_id(self) -> int:
        return BOS
