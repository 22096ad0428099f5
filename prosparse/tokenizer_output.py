"""The tokenizer of a written checkpoint: the original's files, or ones that all read alike.

transformers 5 makes of a bare tokenizer.model a tokenizer without BOS and without the space in
front, and merges by the order of ids; its LlamaTokenizer drops a leading space; transformers 4 does
not know the class that transformers 5 writes. A tokenizer.json with everything in it and the class
`PreTrainedTokenizerFast` means the same to both.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from architectures.config_json import Config
from architectures.piece_tokenizer import PieceTokenizer
from architectures.rust_tokenizer import steps_of
from architectures.tokenizer import OwnTokenizer
from common.documents import sample_text
from common.errors import reason
from common.files import write_bytes, write_json
from prosparse.piece_conversion import as_rust

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_CLASS = "PreTrainedTokenizerFast"
_ONLY_5 = "TokenizersBackend"
_OF_ONE_LOADER = ("auto_map", "backend", "extra_special_tokens", "is_local", "local_files_only")
_TEXTS = (" the", "  two  spaces, a   b", "x\n\n y\t z", "naïve 中文 😀 ½", "f(x):\n\treturn 1")
_UNREADABLE = 100
_NO_BOS = 50
"""Counts for more than any number of texts."""


def write_tokenizer(
    source: Path,
    tokenizer: OwnTokenizer,
    config: Config,
    out: Path,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Copy a tokenizer's files, mended where transformers would misread them.

    Args:
        source: the original's directory.
        tokenizer: as psp reads it.
        config: config.json of the copy.
        out: directory of the copy.
        report: receives a line if no files make transformers read what psp does.
    """
    with tempfile.TemporaryDirectory() as name:
        kept, mended = Path(name, "kept"), Path(name, "mended")
        for path in (kept, mended):
            path.mkdir()
            write_json(path / "config.json", dict(config))
            for file in TOKENIZER_FILES:
                if (source / file).is_file():
                    write_bytes(path / file, (source / file).read_bytes())
        chosen, wrong = kept, _wrong(kept, tokenizer)
        if wrong:
            _mend(mended, tokenizer)
            found = _wrong(mended, tokenizer)
            chosen, wrong = (mended, found) if found < wrong else (kept, wrong)
        for file in TOKENIZER_FILES:
            if (chosen / file).is_file():
                write_bytes(out / file, (chosen / file).read_bytes())
    if wrong:
        report(f"transformers reads the tokenizer in {out} otherwise than psp does")


def needs_bos(tokenizer: OwnTokenizer) -> bool:
    """Tell whether a model wants BOS before a text: its tokenizer says so, or is LLaMA's kind."""
    if tokenizer.adds_bos is None:
        return isinstance(tokenizer, PieceTokenizer)
    return tokenizer.adds_bos


@dataclass(frozen=True, kw_only=True)
class Misreading:
    """How transformers reads a tokenizer's files otherwise than psp does.

    Attributes:
        texts: how many of some texts get other ids.
        of: how many were tried.
        bos: whether the one begins a text with BOS and the other does not.
        failure: why transformers cannot read them at all; None if it can.
    """

    texts: int = 0
    of: int = 0
    bos: bool = False
    failure: str | None = None


def misreading(path: Path, tokenizer: OwnTokenizer) -> Misreading | None:
    """Compare what transformers makes of a directory's tokenizer with psp's; None if they agree.

    Args:
        path: directory with config.json and the tokenizer's files; no code of it is run.
        tokenizer: psp's reading of them.
    """
    from transformers import AutoTokenizer

    texts = (*_TEXTS, sample_text()[:4000])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
            other = sum(
                loaded.encode(text, add_special_tokens=False) != tokenizer.encode(text)
                for text in texts
            )
            begun = loaded.encode("a")[:1] == [tokenizer.bos_id()]
    except Exception as error:  # of many kinds: unknown classes, missing packages, damage
        return Misreading(failure=reason(error))
    found = Misreading(texts=other, of=len(texts), bos=begun is not needs_bos(tokenizer))
    return found if found.texts or found.bos else None


def _wrong(path: Path, tokenizer: OwnTokenizer) -> int:
    """Count what transformers reads otherwise than psp: texts, and above all BOS."""
    if _settings(path).get("tokenizer_class") == _ONLY_5:
        return _UNREADABLE  # by transformers 4
    found = misreading(path, tokenizer)
    if found is None:
        return 0
    return _UNREADABLE if found.failure is not None else found.texts + _NO_BOS * found.bos


def _settings(path: Path) -> dict[str, Any]:
    file = path / "tokenizer_config.json"
    found: dict[str, Any] = json.loads(file.read_bytes()) if file.is_file() else {}
    return found


def _mend(path: Path, tokenizer: OwnTokenizer) -> None:
    """Write a tokenizer.json with everything in it, and a tokenizer_config.json that says so."""
    rust = as_rust(tokenizer) if isinstance(tokenizer, PieceTokenizer) else tokenizer.rust
    document = json.loads(rust.to_str())
    bos = rust.id_to_token(tokenizer.bos_id())
    if bos is not None and needs_bos(tokenizer):
        _begin_with(document, bos, tokenizer.bos_id())
    write_json(path / "tokenizer.json", document)
    settings = _settings(path)
    extra = settings.get("extra_special_tokens")
    found = {key: value for key, value in settings.items() if key not in _OF_ONE_LOADER}
    if isinstance(extra, list):
        found.setdefault("additional_special_tokens", extra)
    found |= {"tokenizer_class": _CLASS, "add_bos_token": needs_bos(tokenizer), "bos_token": bos}
    for kind, own in _own_special(tokenizer):
        number = tokenizer.files.special_id(kind, rust.token_to_id, own)[0]
        if number is not None:
            found[f"{kind}_token"] = rust.id_to_token(number)
    write_json(path / "tokenizer_config.json", found | {"clean_up_tokenization_spaces": False})


def _own_special(tokenizer: OwnTokenizer) -> Iterator[tuple[str, int | None]]:
    model = tokenizer.model if isinstance(tokenizer, PieceTokenizer) else None
    for kind in ("eos", "unk"):
        number = -1 if model is None else getattr(model, f"{kind}_id")()
        yield kind, number if number >= 0 else None


def _begin_with(document: dict[str, Any], bos: str, number: int) -> None:
    """Make a description put BOS first, whatever else its post-processor does."""
    steps = list(steps_of(document.get("post_processor"), "processors"))
    kept = [step for step in steps if step["type"] != "TemplateProcessing"]

    def item(kind: str, name: str) -> dict[str, Any]:
        return {kind: {"id": name, "type_id": 0}}

    one = [item("SpecialToken", bos), item("Sequence", "A")]
    template = {
        "type": "TemplateProcessing",
        "single": one,
        "pair": [*one, item("SpecialToken", bos), item("Sequence", "B")],
        "special_tokens": {bos: {"id": bos, "ids": [number], "tokens": [bos]}},
    }
    document["post_processor"] = (
        {"type": "Sequence", "processors": [*kept, template]} if kept else template
    )
