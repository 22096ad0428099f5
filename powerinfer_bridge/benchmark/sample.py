"""One finished run among those of a benchmark, as the journal and the results keep it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from common.files import sha256
from powerinfer_bridge.programs.sample import Phase, RunSample


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A run that counts.

    Attributes:
        arm: name of what ran.
        round: its round, from 1.
        prompt: number of the prompt, from 0.
        run: what was measured.
    """

    arm: str
    round: int
    prompt: int
    run: RunSample

    def document(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return asdict(self)

    @classmethod
    def read(cls, document: dict[str, Any]) -> Sample:
        """Undo `document`.

        Raises:
            KeyError, TypeError: it is none.
        """
        run = dict(document["run"])
        phases = {
            name: None if run[name] is None else Phase(**run[name]) for name in ("prompt", "decode")
        }
        tuples = {name: tuple(run[name]) for name in ("notes", "command")}
        return cls(**{**document, "run": RunSample(**{**run, **phases, **tuples})})

    def row(self) -> dict[str, Any]:
        """Return the figures as results list them."""
        prompt, decode = self.run.prompt, self.run.decode
        text = self.run.text
        return {
            "arm": self.arm,
            "round": self.round,
            "prompt": self.prompt,
            "decode_seconds": decode.seconds,
            "decode_tokens": decode.tokens,
            "prompt_seconds": None if prompt is None else prompt.seconds,
            "prompt_tokens": None if prompt is None else prompt.tokens,
            "load_seconds": self.run.load_seconds,
            "wall_seconds": self.run.wall_seconds,
            "text_sha256": None
            if text is None
            else sha256(text.encode("utf-8", "surrogateescape")),
        }
