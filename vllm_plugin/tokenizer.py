"""Tokenizer mode `psp`: transformers' tokenizer of files that read as psp does, BOS included.

What transformers 5 makes of some files is not the model's own tokenizer: a tokenizer.model alone
gets no BOS and other pieces, and a LlamaTokenizer loses a space at a text's beginning.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from vllm.tokenizers.hf import get_cached_tokenizer

from architectures.checkpoint import read_config
from architectures.config_json import Config, number
from architectures.tokenizer import OwnTokenizer, load_tokenizer
from common.errors import PspError
from prosparse.tokenizer_output import (
    TOKENIZER_FILES,
    Misreading,
    misreading,
    write_tokenizer,
)
from vllm_plugin.register import LOGGER


class PspTokenizer:
    """Makes tokenizers; vLLM asks for a class."""

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | Path,
        *args: Any,
        trust_remote_code: bool = False,
        revision: str | None = None,
        download_dir: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return a tokenizer of a directory or of a repository of the hub; no code of it is run.

        Raises:
            ValueError: in one line, what of its files cannot be used.
        """
        source = _files(str(path_or_repo_id), revision, download_dir, kwargs.get("token"))
        try:
            tokenizer, config = _own(source)
        except PspError as error:
            raise ValueError(f"psp: {error}") from error
        kwargs.pop("config", None)
        with tempfile.TemporaryDirectory() as name:
            write_tokenizer(
                source, tokenizer, config, Path(name), logging.getLogger(LOGGER).warning
            )
            made = AutoTokenizer.from_pretrained(name, *args, **kwargs)
        made.name_or_path = str(path_or_repo_id)
        return get_cached_tokenizer(made)


def read_otherwise(
    name: str, revision: str | None, download_dir: str | None, token: bool | str | None
) -> Misreading | None:
    """Tell how transformers reads a model's tokenizer files otherwise than psp does.

    Raises:
        PspError: psp cannot read them.
    """
    source = _files(name, revision, download_dir, token)
    return misreading(source, _own(source)[0])


def _files(
    name: str, revision: str | None, download_dir: str | None, token: bool | str | None
) -> Path:
    """Return a model's directory; of a repository of the hub the tokenizer's files are fetched."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    patterns, options = ["config.json", *TOKENIZER_FILES], {"cache_dir": download_dir}
    found = snapshot_download(
        name, revision=revision, token=token, allow_patterns=patterns, **options
    )
    return Path(found)


def _own(source: Path) -> tuple[OwnTokenizer, Config]:
    config = read_config(source)
    return load_tokenizer(source, number(config, "vocab_size"), config), config
