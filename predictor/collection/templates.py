"""Which chat template text is put in."""

from __future__ import annotations

from collections.abc import Callable

from architectures.checkpoint import Checkpoint
from architectures.tokenizer import chat_template_of
from common import chat


def choose_template(checkpoint: Checkpoint, choice: str, report: Callable[[str], None]) -> str:
    """Return the name of the template to use.

    Args:
        checkpoint: the model's.
        choice: `auto` goes by the checkpoint's own template, anything else is returned as it is.
        report: receives a line where the user should know what was chosen.
    """
    if choice != "auto":
        return choice
    found = chat.detect(chat_template_of(checkpoint.path))
    if found is None:
        report(
            "chat template: the model has one that psp does not know, text is used as it is; pass "
            "--chat-template none to accept that silently, or data that is already in its form"
        )
        return "none"
    if found == "none" and checkpoint.architecture.name == "minicpm":
        report("chat template: none found; MiniCPM's SFT models want --chat-template minicpm")
    if found != "none":
        report(f"chat template: {found}, as in the model's own; see --chat-template")
    return found
