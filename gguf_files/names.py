"""Names in files that more than one room reads: keys of our own, and the FFN's down matrix."""

VERSION_KEY = "psp.version"
"""String like the other keys of our own, which PowerInfer does not read: psp's version."""

FINGERPRINT_KEY = "psp.model_fingerprint"
"""Fingerprint of the checkpoint that the file was made from."""

ACTIVATION_KEY = "psp.activation"
"""The model's activation function."""

ACTIVATION_THRESHOLD_KEY = "psp.activation_threshold"
"""float32: FATReLU's threshold. PowerInfer computes ReLU whatever it says; who measures predictors
needs to know which neurons they were meant to find."""

RECIPE_KEY = "psp.recipe"
"""How the predictors were made, as JSON."""

PREDICTOR_TYPE_KEY = "psp.predictor_type"
"""Element type of the predictors' matrices as exported: what they were trained and judged for."""

DENSE_LAYERS_KEY = "psp.dense_layers"
"""Numbers, with commas, of the layers of which every neuron is computed; no key if there are none.
PowerInfer sees it in their predictors."""

NOTE_KEY = "psp.note"
"""What a user must know of a dense file."""

HEAD, EMBEDDING, POSITIONS = "output.weight", "token_embd.weight", "position_embd.weight"
"""Matrices outside the blocks."""

DOWN, DENSE_DOWN = "ffn_down_t", "ffn_down"
"""The down matrix in a sparse file, transposed, and in a dense one."""

SMALLTHINKER = "smallthinker"
"""`general.architecture` of models whose FFNs are experts with a ReLU gate. With one expert it is
the right graph of a ReLU-gated LLaMA (llama.cpp@0c1e570 src/models/smallthinker.cpp): softmax over
one router logit is 1, and keys and queries are turned by halves, so their rows are not permuted."""

ROUTER = "ffn_gate_inp"
"""Of such a layer: the matrix that weighs experts, (experts, d_model)."""

PROFILER = "lm_head_profiler.weight"
"""Of such a file for PowerInfer's second engine: the output head's predictor, both matrices one
after the other, fc1 first (PowerInfer@d3ebd7c smallthinker/src/llama-model.cpp)."""


def stays_float16(name: str, head: str) -> bool:
    """Whether a matrix is F16 in a file of whatever type.

    The head's rounding goes into every logit (as with `quantize --leave-output-tensor`); of OPT's
    positions a token reads a single row.

    Args:
        name: its name in the file.
        head: the matrix that makes logits: OPT's is its embedding.
    """
    return name in (head, POSITIONS)


def expert_name(name: str) -> str:
    """Return what an FFN matrix of a sparse or dense file is called where it is one of experts."""
    name = name.replace(f".{DOWN}.", f".{DENSE_DOWN}.")
    for stem in ("ffn_gate", "ffn_up", DENSE_DOWN):
        name = name.replace(f".{stem}.", f".{stem}_exps.")
    return name
