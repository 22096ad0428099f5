"""Settings of `psp verify`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cluster.settings import RayAddress, RayCpus, Verbose
from common.errors import SettingsError
from common.settings import MODEL_FORMS, ModelFile, Option, check_settings


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """What to check."""

    file: ModelFile
    model: Annotated[
        str | None, Option("Compare tensors, tokens and logits with this checkpoint.", MODEL_FORMS)
    ] = None
    max_ppl_gap: Annotated[
        float | None,
        Option("With --model: largest perplexity gap that passes, a fraction.", above=0),
    ] = None

    ray: RayAddress = None
    ray_cpus: RayCpus = 1
    verbose: Verbose = False

    def __post_init__(self) -> None:
        """Refuse settings that no file can pass."""
        check_settings(self, SettingsError)
        if self.max_ppl_gap is not None and self.model is None:
            raise SettingsError("--max-ppl-gap is judged by running the model", "pass --model")
        if self.ray is not None and self.model is None:
            raise SettingsError("--ray spreads the comparison with the model", "pass --model")
