"""The graph of arch `smallthinker` with one expert, in ggml's arithmetic.

Source: llama.cpp@0c1e570 src/models/smallthinker.cpp. As in `engine.Engine` vectors are rounded as
the types of matrices demand; llama.cpp's kernels of today differ from that by their sums' order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from common.machine import weight_budget
from gguf_export.pwri.schema import HEAD
from gguf_export.smallthinker.contract import ExpertFile
from gguf_export.smallthinker.hyperparameters import is_transposed
from powerinfer_bridge.engine.arithmetic import Operators, Weights, rounded
from powerinfer_bridge.engine.attention import Attention, KVCache


class ExpertEngine:
    """A model of one expert a layer, of which every neuron is computed."""

    def __init__(self, path: Path, *, budget: int | None = None) -> None:
        """Open a file.

        Args:
            path: a file of arch `smallthinker`, for llama.cpp or for PowerInfer's second engine.
            budget: as in `engine.Engine`.

        Raises:
            FormatError: its keys or its vocabulary are wrong.
        """
        opened = ExpertFile(path)
        self.hyper, self.vocabulary = opened.hyper, opened.vocabulary
        self.weights = Weights(opened.file, weight_budget() if budget is None else budget)
        self._transposed = is_transposed(opened.file)
        self._head = "output" if HEAD in opened.file.tensors else "token_embd"
        self._operators = Operators(self.weights, self.hyper)
        self._attention = Attention(self._operators)

    def forward(self, tokens: list[int], cache: KVCache) -> torch.Tensor:
        """Return logits (tokens, vocab_size), float32, of tokens that follow those in `cache`."""
        return next(self.forward_all([tokens], [cache]))

    @torch.inference_mode()
    def forward_all(
        self, texts: Sequence[list[int]], caches: Sequence[KVCache]
    ) -> Iterator[torch.Tensor]:
        """Yield the logits of several texts in turn; a weight is read once for all of them.

        Args:
            texts: ids, see `forward`.
            caches: of each text its own.
        """
        norm, weights = self._operators.norm, self.weights
        lengths = [len(text) for text in texts]
        positions = [
            torch.arange(cache.length, cache.length + length)
            for cache, length in zip(caches, lengths, strict=True)
        ]
        x = weights.rows("token_embd", torch.tensor([token for text in texts for token in text]))
        for layer in range(self.hyper.n_layers):
            block = f"blk.{layer}"
            normed = torch.split(norm(f"{block}.attn_norm", x), lengths)
            with weights.held():
                seen = [
                    self._attention(layer, *each)
                    for each in zip(normed, positions, caches, strict=True)
                ]
            x = x + torch.cat(seen)
            x = x + self._expert(block, norm(f"{block}.ffn_norm", x))
        for cache, length in zip(caches, lengths, strict=True):
            cache.length += length
        with weights.held():
            for each in torch.split(norm("output_norm", x), lengths):
                yield self._operators.linear(self._head, each)

    def _expert(self, block: str, normed: torch.Tensor) -> torch.Tensor:
        """Return what the FFN adds to the residual stream, (tokens, d_model)."""
        gate, up = (self._product(f"{block}.ffn_{part}_exps", normed) for part in ("gate", "up"))
        neurons, down = torch.relu(gate) * up, f"{block}.ffn_down_exps"
        if self._transposed:
            return rounded(neurons, self.weights.kind(down)) @ self._matrix(down)
        return self._product(down, neurons)

    def _product(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Multiply (tokens, n) by the one expert's matrix (m, n)."""
        return rounded(x, self.weights.kind(name)) @ self._matrix(name).T

    def _matrix(self, name: str) -> torch.Tensor:
        """Return the one expert's matrix, stored with or without a dimension of experts."""
        return self.weights(name).flatten(0, -2)
