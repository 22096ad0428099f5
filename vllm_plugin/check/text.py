"""The tokenizer as transformers, and so vLLM, reads it, beside psp's reading; the chat template."""

from __future__ import annotations

from collections.abc import Iterator

from architectures.config_json import number
from architectures.tokenizer import chat_template_of, load_tokenizer
from common.errors import CheckpointError, reason
from common.finding import Finding, note, ok, warning
from prosparse.tokenizer_output import Misreading, misreading
from vllm_plugin.check.model import Subject
from vllm_plugin.check.plan import TOKENIZER_MODE


def tokenizer_findings(subject: Subject) -> Iterator[Finding]:
    """Judge how transformers reads the tokenizer."""
    try:
        found = _compare(subject)
    except CheckpointError as error:
        yield note("tokenizer", f"not compared with psp's reading: {error.problem}", error.remedy)
        return
    except ImportError as error:
        told = f"not compared with psp's reading: transformers fails ({reason(error)})"
        yield note("tokenizer", told)
        return
    if found is None:
        yield ok("tokenizer", "transformers gives the ids that psp does")
    elif subject.left_to_vllm:
        yield warning("tokenizer", f"transformers {_differs(found)}", f"pass {TOKENIZER_MODE}")
    else:
        told = f"transformers {_differs(found)}; vLLM takes psp's reading ({TOKENIZER_MODE})"
        yield note("tokenizer", told)


def _differs(found: Misreading) -> str:
    if found.failure is not None:
        return f"cannot read it: {found.failure}"
    ids = f"gives other ids in {found.texts} of {found.of} texts" if found.texts else ""
    bos = "does not begin texts as the model wants (BOS)" if found.bos else ""
    return " and ".join(filter(None, (ids, bos)))


def _compare(subject: Subject) -> Misreading | None:
    """Let transformers read the tokenizer as it does in vLLM; None if it reads what psp does.

    Raises:
        CheckpointError: psp cannot read it.
    """
    from vllm_plugin.configs import register_configs

    rows = number(subject.config, "vocab_size")
    tokenizer = load_tokenizer(subject.path, rows, subject.config)
    register_configs()
    return misreading(subject.path, tokenizer)


def template_findings(subject: Subject) -> Iterator[Finding]:
    """Tell whether conversations can be served."""
    try:
        template = chat_template_of(subject.path)
    except CheckpointError as error:
        yield warning("chat template", error.problem, "mend the file, or pass --chat-template FILE")
        return
    if template is None:
        found = "none: prompts are served, conversations (/v1/chat/completions) are not"
        yield note("chat template", found, "to serve conversations: --chat-template FILE")
    else:
        yield note("chat template", "there is one: conversations are served too")
