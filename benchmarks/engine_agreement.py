"""How far PowerInfer's server and the embedded engine agree on an evaluation's requests.

Prints one JSON line: differences of log-likelihoods over pairs of a context and what followed it,
over odd last tokens and over one whole text; greedy texts that are equal; seconds of each; and by
how much sharing a context moves the embedded engine's own answers, and what it saves.

    python benchmarks/engine_agreement.py FILE --powerinfer-bin DIR --data valid.txt
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import click
import torch

from benchmarks.shared import print_line
from evaluation.backends.backend import Decoding, Prompt, Score, Scoring
from evaluation.backends.embedded import EmbeddedBackend
from evaluation.backends.powerinfer import PowerInferBackend
from gguf_export.contract import OpenedFile
from gguf_export.tokens.vocabulary import BYTE_PIECES, PIECES, Vocabulary

Answer = TypeVar("Answer")
_STOPS = ("\n\n", "def ")
_CHARACTERS, _EVERY = 400, 2000


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--powerinfer-bin", required=True, type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Text.")
@click.option("--pairs", default=60, show_default=True)
@click.option("--rolling", default=300, show_default=True, help="Tokens of the whole text.")
@click.option("--texts", default=20, show_default=True)
@click.option("--threads", default=1, show_default=True, help="Of both engines.")
def main(
    file: Path, powerinfer_bin: Path, data: Path, pairs: int, rolling: int, texts: int, threads: int
) -> None:
    """Run the comparison."""
    torch.set_num_threads(threads)
    vocabulary = OpenedFile(file).vocabulary
    text = data.read_text(encoding="utf-8")
    parts = [text[at * _EVERY :][:_CHARACTERS] for at in range(max(pairs, texts))]
    embedded = EmbeddedBackend(file)
    real = PowerInferBackend(file, powerinfer_bin, threads=threads)
    try:
        asked = draw_pairs(vocabulary, parts[:pairs])
        ids = tuple(vocabulary.text_ids(text[5000:])[: rolling + 1])
        whole = [Scoring(ids=ids[:-1], targets=(ids[1:],))]
        prompts = [part[:150] for part in parts[:texts]]
        print_line(
            {
                "pairs": compare(embedded, real, asked),
                "odd": compare(embedded, real, [odd(vocabulary, pair) for pair in asked[:10]]),
                "rolling": compare(embedded, real, whole),
                "texts": {n: same_texts(embedded, real, prompts, n) for n in (1, 3, 4, 32)},
                "sharing": sharing(embedded, vocabulary, text),
            }
        )
    finally:
        real.close()


def draw_pairs(vocabulary: Vocabulary, parts: Sequence[str]) -> list[Scoring]:
    """Cut each part at a random place, 1 to 4 tokens before the end of what is kept."""
    drawn, made = random.Random(0), list[Scoring]()
    for part in parts:
        ids = tuple(vocabulary.text_ids(part))
        cut, count = drawn.randrange(20, 60), drawn.randrange(1, 5)
        made.append(Scoring(ids=ids[: cut + count - 1], targets=(ids[cut : cut + count],)))
    return made


def odd(vocabulary: Vocabulary, pair: Scoring) -> Scoring:
    """Replace the last token by control tokens, bytes with and without a twin, and halves."""
    tokens = {vocabulary.bos_id, max(vocabulary.eos_id, 0), 0}
    if vocabulary.kind == PIECES:
        tokens |= {vocabulary.ids[p] for p in BYTE_PIECES if p in (b"<0x00>", b"<0x0A>", b"<0xE4>")}
        tokens |= {vocabulary.ids[b"<0x41>"], vocabulary.ids.get(b"A", 0)}
    start = pair.targets[0][:-1]
    return Scoring(ids=pair.ids, targets=tuple((*start, token) for token in sorted(tokens)))


def timed(run: Callable[[], Answer]) -> tuple[Answer, float]:
    """Return what a call returns, and its seconds."""
    start = time.perf_counter()
    return run(), round(time.perf_counter() - start, 2)


def compare(
    embedded: EmbeddedBackend, real: PowerInferBackend, asked: Sequence[Scoring]
) -> dict[str, float]:
    """Score by both."""
    ours, seconds = timed(lambda: embedded.score(asked))
    theirs, their_seconds = timed(lambda: real.score(asked))
    return differences(ours, theirs) | {
        "tokens": sum(len(request.targets[0]) for request in asked),
        "seconds": seconds,
        "powerinfer_seconds": their_seconds,
    }


def differences(one: list[list[Score]], other: list[list[Score]]) -> dict[str, float]:
    """Return how far scores are apart, nats."""
    pairs = [p for a, b in zip(one, other, strict=True) for p in zip(a, b, strict=True)]
    apart = [abs(a.loglikelihood - b.loglikelihood) for a, b in pairs]
    return {
        "scores": len(apart),
        "largest": max(apart),
        "mean": sum(apart) / len(apart),
        "lowest": min(a.loglikelihood for a, _ in pairs),
        "greedy_differ": sum(a.greedy != b.greedy for a, b in pairs),
    }


def same_texts(
    embedded: EmbeddedBackend, real: PowerInferBackend, texts: Sequence[str], count: int
) -> str:
    """Return how many greedy texts are equal up to a stop text."""
    vocabulary = embedded.vocabulary
    asked = [Prompt(text=text, ids=tuple(vocabulary.text_ids(text))) for text in texts]
    decoding = Decoding(stop=_STOPS, max_new_tokens=count)
    made = zip(embedded.generate(asked, decoding), real.generate(asked, decoding), strict=True)
    return f"{sum(cut(ours) == cut(theirs) for ours, theirs in made)}/{len(asked)}"


def cut(text: str) -> str:
    """Return a text up to its first stop text."""
    return text[: min([at for at in map(text.find, _STOPS) if at >= 0], default=len(text))]


def sharing(embedded: EmbeddedBackend, vocabulary: Vocabulary, text: str) -> dict[str, float]:
    """Score 4 choices after each of 20 contexts, one after another and each alone."""
    asked = list[Scoring]()
    for number in range(20):
        context = vocabulary.text_ids(text[number * 3000 :][:_CHARACTERS])
        for choice in range(4):
            end = vocabulary.encode(text[100_000 + number * 500 + choice * 97 :][:30])[:5]
            asked.append(Scoring(ids=(*context, *end[:-1]), targets=(tuple(end),)))

    def alone() -> list[list[Score]]:
        found = list[list[Score]]()
        for request in asked:
            embedded.close()
            found += embedded.score([request])
        return found

    embedded.close()
    shared, seconds = timed(lambda: embedded.score(asked))
    apart, alone_seconds = timed(alone)
    return differences(shared, apart) | {"seconds": seconds, "alone_seconds": alone_seconds}


if __name__ == "__main__":
    main()
