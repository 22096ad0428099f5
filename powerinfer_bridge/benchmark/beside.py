"""Files that a benchmark measures beside the sparse one: of the same model and vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFValueType, TokenType

from common.errors import FormatError
from gguf_files.names import FINGERPRINT_KEY
from gguf_files.reader import GGUFFile

_OF_THE_SAME = "pass a file of the same model"


@dataclass(frozen=True, kw_only=True)
class DenseFile:
    """A file beside the sparse one.

    Attributes:
        path: the file.
        element_type: type that most of its bytes have.
        architecture: `general.architecture`.
        same_model: whether both files say that they are of one model; False where one says nothing.
    """

    path: Path
    element_type: str
    architecture: str
    same_model: bool = True


def open_dense(path: Path | None, sparse: GGUFFile) -> DenseFile | None:
    """Open a dense file, if there is one.

    Args:
        path: of the file.
        sparse: the one whose model it must be.

    Raises:
        FormatError: it is sparse, damaged, or of another model or vocabulary.
    """
    if path is None:
        return None
    file = GGUFFile(path)
    if file.sparse:
        raise FormatError(
            f"{path}: is a sparse file (magic PWRI)",
            "pass a dense one, such as 'psp export-gguf --dense' writes",
        )
    return described(file, sparse)


def described(file: GGUFFile, sparse: GGUFFile) -> DenseFile:
    """Return what results say of a file beside the sparse one.

    Raises:
        FormatError: it is of another model or vocabulary.
    """
    return DenseFile(
        path=file.path,
        element_type=element_type(file),
        architecture=file.value("general.architecture", GGUFValueType.STRING),
        same_model=same_model(file, sparse),
    )


def same_model(file: GGUFFile, sparse: GGUFFile) -> bool:
    """Tell whether two files say that they are of one model; False where one says nothing.

    Raises:
        FormatError: they are of two models, or of vocabularies whose perplexities mean different
            things.
    """
    told = [each.optional(FINGERPRINT_KEY, GGUFValueType.STRING, None) for each in (file, sparse)]
    if None not in told and told[0] != told[1]:
        raise FormatError(
            f"{file.path}: was made from another model than {sparse.path}", _OF_THE_SAME
        )
    for what, names in (("tokens", _tokens), ("merges", _merges)):
        if names(file) != names(sparse):
            raise FormatError(
                f"{file.path}: has other {what} than {sparse.path}, so perplexities would not be "
                "comparable",
                _OF_THE_SAME,
            )
    return None not in told


def _tokens(file: GGUFFile) -> dict[int, bytes]:
    """Return a vocabulary's tokens by id, without what only fills rows of the embedding."""
    tokens = file.value("tokenizer.ggml.tokens", GGUFValueType.ARRAY, GGUFValueType.STRING)
    types = file.values.get("tokenizer.ggml.token_type")
    kinds = [int(TokenType.NORMAL)] * len(tokens) if types is None else list(types.data)
    return {
        number: token
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind != TokenType.UNUSED
    }


def _merges(file: GGUFFile) -> list[bytes]:
    value = file.values.get("tokenizer.ggml.merges")
    return [] if value is None else list(value.data)


def element_type(file: GGUFFile) -> str:
    """Return the type that most of a file's bytes have, predictors aside."""
    sizes: dict[str, int] = {}
    for name, info in file.tensors.items():
        if not name.endswith((".fc1.weight", ".fc2.weight")):
            sizes[info.kind.name] = sizes.get(info.kind.name, 0) + info.size
    return max(sizes, key=lambda kind: sizes[kind], default="none")
