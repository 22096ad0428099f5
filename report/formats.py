"""Numbers and texts as the page writes them; bytes are `common.units.size`."""

from __future__ import annotations

NOTHING = "–"
_LONGEST = 4000


def per_cent(share: float) -> str:
    """Return a share in per cent, without the sign, as model cards have it."""
    return f"{100 * share:.2f}"


def signed_per_cent(share: float) -> str:
    """Return a change in per cent, with sign."""
    text = f"{100 * share:+.2f}\xa0%".replace("-", "−")
    return text[1:] if text[1:].startswith("0.00") else text


def tokens_per_second(value: float) -> str:
    """Return tokens per second, three digits or more."""
    return f"{value:.2f}" if value < 100 else f"{value:.1f}"


def ratio(value: float) -> str:
    """Return how many times as much."""
    return f"{value:.2f}"


def visible(text: str) -> str:
    """Escape what cannot be seen: control characters, turns of writing direction, half surrogates.

    Otherwise a hostile name could show another text than it holds.
    """
    kept = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
    return "".join(c if c.isprintable() or c in "\n\t\xa0" else ascii(c)[1:-1] for c in kept)
