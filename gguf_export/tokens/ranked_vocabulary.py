"""A LLaMA-like vocabulary from a tokenizer.json whose BPE falls back to bytes.

`tokenizers` merges the pair of the best rank, PowerInfer the pair whose joined token has the best
score. A token's score is therefore minus the best rank of the merges that make it. Both find the
same ids if every pair of tokens that joins to a token is a merge, and a token's merges follow each
other, as in files made from a SentencePiece model.
"""

from __future__ import annotations

from collections.abc import Iterator

from gguf import TokenType

from architectures.tokenizer import RustTokenizer
from gguf_export.tokens.added_tokens import TokenizerFiles
from gguf_export.tokens.json_tokenizer import JsonTokenizer
from gguf_export.tokens.sentencepiece_vocabulary import place_added
from gguf_export.tokens.vocabulary import (
    BYTE_PIECES,
    NONE,
    PIECES,
    Vocabulary,
    lay_out,
    mark_control,
)


def read_ranked(
    source: JsonTokenizer, tokenizer: RustTokenizer, files: TokenizerFiles, vocab_size: int
) -> Vocabulary:
    """Turn vocabulary and merges into pieces and scores.

    Args:
        source: the description, already checked.
        tokenizer: the same, loaded.
        files: the settings around it.
        vocab_size: rows of the embedding.

    Raises:
        CheckpointError: an added token in the place of an ordinary one.
    """
    model = source.model
    vocab: dict[str, int] = model["vocab"]
    unknown = model.get("unk_token")
    placed = {n: (token.encode(), _type(token, unknown)) for token, n in vocab.items()}
    beyond = place_added(source.file, files.added, placed, vocab_size)
    tokens, types = lay_out(placed, vocab_size)
    merges = source.merges
    ranks = {left + right: rank for rank, (left, right) in reversed([*enumerate(merges)])}
    worst = -float(len(merges))
    scores = [worst] * vocab_size
    for token, rank in ranks.items():
        scores[vocab[token]] = -float(rank)
    ids = {token: number for number, token in enumerate(tokens)}
    found = {kind: files.special_id(kind, ids) for kind in ("eos", "unk", "pad")}
    unk = vocab.get(unknown or "", NONE)
    mark_control(types, tokenizer.bos_id(), found["eos"], found["pad"])
    return Vocabulary(
        kind=PIECES,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=[],
        bos_id=tokenizer.bos_id(),
        eos_id=NONE if found["eos"] is None else found["eos"],
        unk_id=unk if found["unk"] is None else found["unk"],
        pad_id=NONE if found["pad"] is None else found["pad"],
        add_bos=tokenizer.adds_bos() or files.add_bos,
        differences=(*_inconsistencies(vocab, merges), *_splits(source)),
        warnings=tuple(beyond),
    )


def _type(token: str, unknown: str | None) -> int:
    if token == unknown:
        return int(TokenType.UNKNOWN)
    return int(TokenType.BYTE if token.encode() in BYTE_PIECES else TokenType.NORMAL)


def _inconsistencies(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Iterator[str]:
    """Yield how scores of tokens cannot say what the ranks of pairs say."""
    last: dict[str, int] = {}
    apart = 0
    for rank, (left, right) in enumerate(merges):
        token = left + right
        apart += last.get(token, rank - 1) != rank - 1
        last[token] = rank
    if apart:
        yield f"{apart} of {len(merges)} merges make a token whose other merges rank elsewhere"
    known = set(merges)
    missing = sum(
        token[:at] in vocab and token[at:] in vocab and (token[:at], token[at:]) not in known
        for token in vocab
        for at in range(1, len(token))
    )
    if missing:
        yield f"{missing} pairs join to a token without a merge, and PowerInfer merges them too"


def _splits(source: JsonTokenizer) -> Iterator[str]:
    """Yield how texts are prepared otherwise than PowerInfer prepares them."""
    prefixes = [step["type"] == "Prepend" for step in source.normalisers]
    for step in source.pre_tokenisers:
        if step["type"] == "Metaspace":
            prefixes.append(step.get("prepend_scheme", "always") != "never")
            if prefixes[-1]:
                yield "a text that starts with a space gets none in front, PowerInfer adds one"
        else:
            yield f"the model's tokenizer splits words by {step['type']}, PowerInfer does not"
    if not any(prefixes):
        yield "the model's tokenizer puts no space before a text, PowerInfer does"
