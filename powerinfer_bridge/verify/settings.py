"""Settings of `psp verify`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from common.settings import ModelFile, Option


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """What to check."""

    file: ModelFile
    model: Annotated[
        str | None, Option("Compare tensors, tokens and logits with this checkpoint.", "DIR|HUB_ID")
    ] = None
    max_ppl_gap: Annotated[
        float | None,
        Option("With --model: largest perplexity gap that passes, a fraction.", above=0),
    ] = None
