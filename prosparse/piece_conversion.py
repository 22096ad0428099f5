"""A SentencePiece model as a tokenizer of Hugging Face's `tokenizers`, with the same ids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from architectures.piece_merges import merges_by_score
from architectures.piece_tokenizer import PieceTokenizer

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

_SPACE = "\u2581"


def as_rust(tokenizer: PieceTokenizer) -> tokenizers.Tokenizer:
    """Return what finds SentencePiece's ids by ranks: of pairs by the score of what they join to.

    Behind an added token there is a space in front or not, as `legacy` in tokenizer_config.json
    says; without it a text that begins with spaces loses one, as in transformers' own conversion.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    model, added = tokenizer.model, tokenizer.files.added
    vocab = {model.id_to_piece(number): number for number in range(model.vocab_size())}
    pairs = merges_by_score(_joined(model))
    vocab |= {token.content: number for number, token in added.items()}
    unknown = model.id_to_piece(model.unk_id())
    rust = Tokenizer(models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    later = any(number >= model.vocab_size() for number in added)
    if later and tokenizer.files.settings.get("legacy") is not True:
        rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        steps = [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
        rust.normalizer = normalizers.Sequence(steps)
    rust.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = [text for text, number in vocab.items() if _controls(model, number)]
    rust.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    rust.add_tokens(
        [
            AddedToken(
                token.content,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                single_word=token.single_word,
                normalized=False,
                special=token.special,
            )
            for _, token in sorted(added.items())
        ]
    )
    return rust


def _controls(model: sentencepiece.SentencePieceProcessor, number: int) -> bool:
    own = number < model.vocab_size()
    return own and bool(model.is_control(number) or model.is_unknown(number))


def _joined(model: sentencepiece.SentencePieceProcessor) -> Iterator[tuple[str, float]]:
    for number in range(model.vocab_size()):
        if not _controls(model, number) and not model.is_byte(number):
            yield model.id_to_piece(number), model.get_score(number)
