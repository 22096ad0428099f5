"""The element types of matrices that PowerInfer's sparse operators run, by the names users type.

Another one is an entry here; what it is called in a file is its name in capitals
(`gguf.GGMLQuantizationType`).
"""

from __future__ import annotations

from dataclasses import dataclass

from common.decisions import predictor_share


@dataclass(frozen=True, kw_only=True)
class ElementType:
    """How numbers are stored.

    Attributes:
        block: numbers that are rounded together.
        block_bytes: what they take.
        row_multiple: what the length of a row must be a multiple of.
        fine: whether small differences of large numbers survive, as offsets by a constant need.
        gpu_block: neurons that PowerInfer's CUDA kernels take at once.
        gpu_rest: whether a layer whose neurons are no multiple of that may go there whole.
    """

    block: int
    block_bytes: int
    row_multiple: int
    fine: bool
    gpu_block: int
    gpu_rest: bool

    @property
    def width(self) -> float:
        """Bytes of a number relative to float16."""
        return self.block_bytes / (2 * self.block)

    def padded(self, length: int) -> int:
        """Return the length of a row as it is stored, such as a predictor's rank."""
        return length + -length % self.row_multiple

    def row_items(self, length: int) -> int:
        """Return the items of a stored row: numbers, or bytes where they come in blocks."""
        return length if self.block == 1 else length // self.block * self.block_bytes

    def relative(
        self, rank: int, *, d_model: int, d_ff: int, ffn_matrices: int, ffn: ElementType
    ) -> float:
        """Return the bytes of a predictor of this type relative to its FFN in another."""
        sizes = {"d_model": d_model, "d_ff": d_ff, "ffn_matrices": ffn_matrices}
        width = self.width / ffn.width
        return predictor_share(self.padded(rank), predictor_width=width, **sizes)


F16, Q4_0 = "f16", "q4_0"
ELEMENT_TYPES = {
    F16: ElementType(
        block=1, block_bytes=2, row_multiple=32, fine=True, gpu_block=32, gpu_rest=True
    ),
    # Rows of two blocks: the ARM kernels take them in pairs and would read past the row
    # (PowerInfer@d3ebd7c ggml-quants.c:ggml_vec_dot_q4_0_q8_0).
    Q4_0: ElementType(
        block=32, block_bytes=18, row_multiple=64, fine=False, gpu_block=256, gpu_rest=False
    ),
}
ELEMENT_NAMES = tuple(ELEMENT_TYPES)

DENSE_NAMES = ("f16", "bf16", "q8_0", "q4_0")
"""Element types in which psp writes files for llama.cpp."""
