"""What every tokenizer.json has that is made from a file's vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import TokenType

from architectures.gguf_model.tokenizer_files import FileVocabulary
from common.errors import reason

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.json"


def save(
    tokenizer: tokenizers.Tokenizer, vocabulary: FileVocabulary, directory: Path, *, begun: bool
) -> dict[str, Any]:
    """Add tokens that are found whole in texts and what stands around a text, and write.

    Args:
        tokenizer: its model, normaliser, pre-tokenizer and decoder.
        vocabulary: the file's.
        directory: where to.
        begun: whether BOS begins a text, unless the file says otherwise.

    Returns:
        What tokenizer_config.json says of it. Of another class, transformers 5 builds the steps
        before the model anew, its own way.
    """
    from tokenizers import AddedToken

    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
            special = kind != TokenType.USER_DEFINED
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    around = {
        "bos": vocabulary.flag("add_bos_token", begun),
        "eos": vocabulary.flag("add_eos_token", False),
    }
    tokenizer.post_processor = _template(vocabulary, **around)
    tokenizer.save(str(directory / FILE))
    added = {f"add_{name}_token": there for name, there in around.items()}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **added}


def bpe(vocabulary: FileVocabulary, merges: list[tuple[str, str]], **settings: Any) -> Any:
    """Return a BPE model of the file's tokens.

    Raises:
        CheckpointError: merges of what are no tokens.
    """
    from tokenizers import models

    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    try:
        return models.BPE(ids, merges, **settings)
    except Exception as error:  # the library's own kind has no name
        raise vocabulary.error(f"merges do not fit its tokens ({reason(error)})") from error


def _template(vocabulary: FileVocabulary, *, bos: bool, eos: bool) -> Any:
    from tokenizers.processors import TemplateProcessing

    special = vocabulary.special
    first = [vocabulary.tokens[special["bos"]]] if bos else []
    last = [vocabulary.tokens[special["eos"]]] if eos else []
    one, two = [*first, "$A", *last], [*first, "$B", *last]
    named = {(token, vocabulary.tokens.index(token)) for token in (*first, *last)}
    return TemplateProcessing(single=one, pair=[*one, *two], special_tokens=sorted(named))
