"""`vllm serve` with the plugin, asked by a plain HTTP client; and lm-eval on top of vLLM."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import BY_NAME, Written, write
from test_vllm import CLOSE, SIZES, probabilities

from architectures.tokenizer import load_tokenizer
from gguf_export.pwri.statistics import read_statistics

pytestmark = pytest.mark.vllm

MADE = 8
TEXTS = ["The quick brown fox", " def f(x):", "import os, sys\n", "In the beginning"]


@dataclass
class Server:
    """A server of one model.

    Attributes:
        written: the model.
        url: of the API.
        statistics: where it counts.
        process: its own.
    """

    written: Written
    url: str
    statistics: Path
    process: subprocess.Popen[bytes]

    def post(self, path: str, **body: Any) -> Any:
        """Return the response, still open."""
        data = json.dumps({"model": "m", "temperature": 0, **body}).encode()
        request = urllib.request.Request(
            f"{self.url}/v1/{path}", data, {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=120)

    def complete(self, text: str, **more: Any) -> dict[str, Any]:
        """Return the only choice for a text."""
        body = {"max_tokens": MADE, "logprobs": 0, "ignore_eos": True, "return_token_ids": True}
        with self.post("completions", prompt=text, **body, **more) as response:
            choice: dict[str, Any] = json.load(response)["choices"][0]
        return choice

    def ids(self, text: str) -> list[int]:
        """Return the model's own ids, BOS first."""
        tokenizer = load_tokenizer(self.written.path, self.written.variant.config["vocab_size"])
        return [tokenizer.bos_id(), *tokenizer.encode(text)]


@pytest.fixture(scope="module")
def server(
    vllm_python: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer_bytes: bytes
) -> Iterator[Server]:
    """Serve ProSparse's layout, with a tokenizer.model alone, sparse operators and counts on."""
    directory = tmp_path_factory.mktemp("server")
    written = write(BY_NAME["prosparse"].changed(**SIZES), directory / "model", tokenizer_bytes)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = ["--port", port, "--host", "127.0.0.1", "--served-model-name", "m"]
    arguments += ["--dtype", "float32", "--max-model-len", "96", "--enforce-eager"]
    environment = {
        "PYTHONPATH": "",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(directory / "cache"),
        "PSP_VLLM_SPARSE": "1",
        "PSP_VLLM_STATS": str(directory / "counts"),
    }
    log = directory / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [vllm_python, "-m", "vllm.entrypoints.cli.main", "serve", written.path, *arguments],
            env=os.environ | environment,
            stdout=out,
            stderr=out,
        )
    made = Server(written, f"http://127.0.0.1:{port}", directory / "counts", process)
    try:
        wait_until_up(made, log)
        yield made
    finally:
        process.kill()
        process.wait()


def wait_until_up(server: Server, log: Path) -> None:
    deadline = time.monotonic() + 300
    while True:
        assert server.process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        try:
            urllib.request.urlopen(f"{server.url}/health", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)


def check(server: Server, text: str, choice: dict[str, Any]) -> None:
    prompt = server.ids(text)
    assert choice["prompt_token_ids"] == prompt
    ids = [*prompt, *choice["token_ids"]]
    assert len(choice["token_ids"]) == MADE
    told = torch.tensor(choice["logprobs"]["token_logprobs"], dtype=torch.float64)
    expected = probabilities(server.written, ids)[len(prompt) - 1 :]
    assert (told - expected).abs().max() < CLOSE


@pytest.mark.parametrize("text", TEXTS)
def test_a_completion_has_the_models_ids_and_probabilities(server: Server, text: str) -> None:
    check(server, text, server.complete(text))


def test_a_stream_brings_the_same_text(server: Server) -> None:
    whole = server.complete(TEXTS[0])
    parts = []
    with server.post(
        "completions", prompt=TEXTS[0], max_tokens=MADE, ignore_eos=True, stream=True
    ) as response:
        for line in response:
            data = line.decode().removeprefix("data: ").strip()
            if data and data != "[DONE]":
                parts.append(json.loads(data)["choices"][0]["text"])
    assert len(parts) > 1
    assert "".join(parts) == whole["text"]


def test_of_many_requests_at_once_none_is_lost(server: Server) -> None:
    texts = [f"{TEXTS[number % len(TEXTS)]}{number}" for number in range(32)]
    with ThreadPoolExecutor(32) as pool:
        choices = list(pool.map(server.complete, texts))
    for text, choice in zip(texts, choices, strict=True):
        check(server, text, choice)


def test_counts_outlive_the_server(server: Server) -> None:
    """Last: it kills the server."""
    answered = server.complete(TEXTS[0])
    time.sleep(3)
    server.process.kill()
    server.process.wait()
    facts = json.loads((server.statistics / "statistics.json").read_text())
    assert facts["tokens"] >= len(answered["prompt_token_ids"]) + MADE - 1
    config = server.written.variant.config
    sizes = config["num_hidden_layers"], config["intermediate_size"]
    counts = torch.stack(read_statistics(server.statistics, *sizes))
    share = counts.double().mean().item() / facts["tokens"]
    assert facts["activation_sparsity"] == pytest.approx(1 - share)
    assert 0 < share < 1


TASK = """
task: psp_lines
dataset_path: json
dataset_kwargs: {data_files: {validation: FILE}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""


def test_lm_eval_runs_models_through_the_plugin(
    vllm_python: Path, server: Server, tmp_path: Path
) -> None:
    """Its log-likelihoods are the formula's, the first id being BOS."""
    data, choices = tmp_path / "data.jsonl", ["fox", "dog"]
    rows = [{"question": text, "choices": choices, "answer": 0} for text in TEXTS[:2]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK.replace("FILE", str(data)))
    out = tmp_path / "out"
    model = f"pretrained={server.written.path},dtype=float32,max_model_len=96,enforce_eager=True"
    arguments = [
        "--model",
        "vllm",
        "--model_args",
        f"{model},tokenizer_mode=psp,add_bos_token=True",
    ]
    arguments += ["--tasks", "psp_lines", "--include_path", str(tmp_path), "--batch_size", "4"]
    environment = {
        "PYTHONPATH": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    ended = subprocess.run(
        [vllm_python, "-m", "lm_eval", *arguments, "--output_path", out, "--log_samples"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    (file,) = out.rglob("samples_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    for sample in sorted(samples, key=lambda each: int(each["doc_id"])):
        text = TEXTS[sample["doc_id"]]
        for (said, _), choice in zip(sample["filtered_resps"], choices, strict=True):
            prompt, ids = server.ids(text), server.ids(f"{text} {choice}")
            expected = probabilities(server.written, ids)[len(prompt) - 1 :].sum()
            assert float(said) == pytest.approx(float(expected), abs=0.01)
