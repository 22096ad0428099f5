"""English prose that every Python has: the default text where the user names none."""

from __future__ import annotations

_LEAST_WORDS = 40


def sample_text() -> str:
    """Return the prose of the language reference's topics (`pydoc_data.topics`)."""
    from pydoc_data.topics import topics

    paragraphs: list[str] = []
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            if len(paragraph.split()) >= _LEAST_WORDS:
                paragraphs.append(" ".join(paragraph.split()))
    return "\n".join(paragraphs)
