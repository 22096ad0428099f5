"""What tests of the real thing need and no package brings; the environment says where it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

POWERINFER_BIN = os.environ.get("PSP_POWERINFER_BIN")
LLAMA_CPP_BIN = os.environ.get("PSP_LLAMA_CPP_BIN")
SECOND_ENGINE_BIN = os.environ.get("PSP_SECOND_ENGINE_BIN")
TRANSFORMERS_4 = os.environ.get("PSP_TRANSFORMERS_4")
PUBLISHED = os.environ.get("PSP_PUBLISHED")
VLLM_PYTHON = os.environ.get("PSP_VLLM_PYTHON")


@pytest.fixture(scope="session", autouse=True)
def no_programs() -> None:
    """Only the tests that ask for the real programs may use them.

    Not on import: xdist's workers inherit the environment of a process that imported this too.
    """
    for name in ("PSP_POWERINFER_BIN", "PSP_LLAMA_CPP_BIN", "PSP_SECOND_ENGINE_BIN"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def powerinfer_bin() -> Path:
    """Directory of real PowerInfer programs, or a visible skip."""
    if not POWERINFER_BIN:
        pytest.skip("set PSP_POWERINFER_BIN to a PowerInfer build's bin directory to run this")
    return Path(POWERINFER_BIN)


@pytest.fixture(scope="session")
def published_dir() -> Path:
    """Directory of published vocabularies, or a visible skip."""
    if not PUBLISHED:
        pytest.skip("set PSP_PUBLISHED to a directory that tests/fetch_published.sh filled")
    return Path(PUBLISHED)


@pytest.fixture(scope="session")
def llama_cpp_bin() -> Path:
    """Directory of real llama.cpp programs, or a visible skip."""
    if not LLAMA_CPP_BIN:
        pytest.skip("set PSP_LLAMA_CPP_BIN to a llama.cpp build's bin directory to run this")
    return Path(LLAMA_CPP_BIN)


@pytest.fixture(scope="session")
def second_engine_bin() -> Path:
    """Directory of real programs of PowerInfer's second engine, or a visible skip."""
    if not SECOND_ENGINE_BIN:
        pytest.skip(
            "set PSP_SECOND_ENGINE_BIN to the bin directory of a build of PowerInfer's folder "
            "smallthinker/ to run this"
        )
    return Path(SECOND_ENGINE_BIN)


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The python of an environment with vLLM, or a visible skip."""
    if not VLLM_PYTHON:
        pytest.skip(
            "set PSP_VLLM_PYTHON to the python of an environment that "
            "tests/make_vllm_environment.sh made to run this"
        )
    return Path(VLLM_PYTHON)


@pytest.fixture(scope="session")
def transformers_4() -> Path:
    """Directory of an installed transformers 4, or a visible skip."""
    if not TRANSFORMERS_4:
        pytest.skip(
            "set PSP_TRANSFORMERS_4 to a directory made by pip install --no-deps --target with "
            "transformers<5, huggingface_hub<1 and tokenizers<0.23 to run this"
        )
    return Path(TRANSFORMERS_4)
