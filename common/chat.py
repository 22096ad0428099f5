"""Conversations and prompts in the format that a chat model was tuned on.

psp runs no template of a checkpoint: a Jinja text is a program, and only its name is needed here.
"""

from __future__ import annotations

from collections.abc import Iterable

from common.errors import DataError

TEMPLATES = ("none", "minicpm")
"""Values of `--chat-template`, besides `auto`."""

_ROLES = ("system", "user", "assistant")
_USER, _ANSWER = "<用户>", "<AI>"


def render(value: object, template: str, where: str) -> str:
    """Return a document as the text that the model is fed.

    Args:
        value: text, or a conversation as a list of `{"role", "content"}` messages.
        template: one of `TEMPLATES`. `none` leaves text as it is. `minicpm` takes text for a single
            question and writes `<用户>question<AI>answer`, every part stripped, as the
            chat_template in MiniCPM's tokenizer_config.json does; a system message stands bare.
        where: what errors name: the file and the row.

    Returns:
        The text; an empty one if no part of a conversation holds any.

    Raises:
        DataError: an unknown template, a conversation without a template, or another shape.
    """
    if template not in TEMPLATES:
        raise DataError(f"{template}: unknown chat template", f"pick one of {', '.join(TEMPLATES)}")
    if isinstance(value, str):
        return value if template == "none" else _minicpm([("user", value)])
    if not isinstance(value, list):
        kind = type(value).__name__
        raise DataError(f"{where}: holds {kind}, neither text nor messages", "mend the row")
    if template == "none":
        raise DataError(
            f"{where}: holds a list, which is read as messages only with a chat template",
            f"pass --chat-template {'|'.join(TEMPLATES[1:])}",
        )
    return _minicpm([_turn(turn, f"{where}, message {n}") for n, turn in enumerate(value)])


def detect(chat_template: str | None) -> str | None:
    """Return which of `TEMPLATES` a checkpoint's own chat template is.

    Args:
        chat_template: its Jinja text, which is searched but never run; None if there is none.

    Returns:
        The name, `none` for a checkpoint without a template, None for one that psp does not know.
    """
    if chat_template is None:
        return "none"
    return "minicpm" if _USER in chat_template else None


def _minicpm(turns: Iterable[tuple[str, str]]) -> str:
    stripped = [(role, content.strip()) for role, content in turns]
    if not any(content for _, content in stripped):
        return ""  # markers alone would pass for a document
    return "".join(
        f"{_USER}{content}{_ANSWER}" if role == "user" else content for role, content in stripped
    )


def _turn(message: object, where: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        kind = type(message).__name__
        raise DataError(f"{where}: is {kind}, not an object with role and content", "mend the row")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        shown = repr(role)[:40] if "role" in message else "missing"
        raise DataError(
            f"{where}: role is {shown}, expected one of {', '.join(_ROLES)}", "mend the row"
        )
    if not isinstance(content, str):
        kind = type(content).__name__ if "content" in message else "missing"
        raise DataError(f"{where}: content is {kind}, expected text", "mend the row")
    return role, content
