"""Texts of many kinds, on which the exported tokenizer is measured against the model's own."""

from __future__ import annotations

from collections.abc import Callable
from difflib import SequenceMatcher

MIXED_TEXTS = (
    "It was late. The lamps along the harbour had gone out one by one, and nobody spoke.",
    "I'll say it isn't so; they've come, we're here, she'd know, he's gone, I'm sure.",
    "In 1984 about 12,345.67 people (3.5 %) paid $99, i.e. 1/3 of 2²³ or ½ of it.",
    "def f(x):\n    return [y ** 2 for y in range(x) if y % 3 == 0]  # squares\n",
    "class Shop:\n\tname = 'shop'\n\n\tdef __init__(self, path=\"/tmp/x\"):\n\t\tself.p = path\n",
    "for (int i = 0; i < n; ++i) {\n    sum += a[i] * b[i];\n}\n\n\n// done\r\nreturn sum;\r\n",
    "SELECT name, age FROM people WHERE id IN (1, 22, 333) AND city <> 'Rome';",
    '{"key": [1, 2.5e-3, null, true], "text": "a\\nb", "url": "https://example.org/?q=1&r=2"}',
    "中文字符，夹杂 english 和数字123。预测神经元的激活。",
    "日本語のテキストと、한국어 문장, и немного кириллицы; ελληνικά, עברית, العربية ١٢٣.",
    "naïve Café, Ångström, e\u0301 \ufb01 \u2014 \u201cquotes\u201d \u2026 \u00a0nbsp\u200b",
    "emoji 😀 👩\u200d👩\u200d👧 🏳️\u200d🌈 🇫🇷 ☃",
    "control \x01\x02\x07\x1b[0m\x7f characters \ufeff\ufffd \x1c\x1f\x85 \u2028",
    "   leading, trailing spaces   ",
    "a  b   c    d\t\te \t f\n\n\ng \n h",
    " ",
    "\n",
    "x",
)


def share_differing(
    ours: Callable[[str], list[int]],
    theirs: Callable[[str], list[int]],
    texts: tuple[str, ...] = MIXED_TEXTS,
) -> float:
    """Return the share of ids, of the longer list, that do not match when aligned in order.

    Args:
        ours: gives a text's ids.
        theirs: gives its ids too.
        texts: what to measure on, short ones: aligning takes quadratic time.
    """
    same, total = 0, 0
    for text in texts:
        mine, other = ours(text), theirs(text)
        total += max(len(mine), len(other))
        if mine == other:
            same += len(mine)
        else:
            matcher = SequenceMatcher(None, mine, other, autojunk=False)
            same += sum(block.size for block in matcher.get_matching_blocks())
    return 1 - same / total if total else 0.0
