"""Writing such a file of a ReLU-gated LLaMA."""

from __future__ import annotations

from pathlib import Path

from gguf import ExpertGatingFuncType

from architectures.checkpoint import Checkpoint
from architectures.spec import ModelShape
from common.hashing import HashedFile
from gguf_export.smallthinker.head_predictor import with_head_predictor
from gguf_export.smallthinker.plan import plan_expert
from gguf_export.smallthinker.requirements import shift_note
from gguf_export.smallthinker.second_engine import stored_neurons
from gguf_export.smallthinker.types import ExpertTypes
from gguf_export.tokens.splitting import bos_keys
from gguf_export.tokens.vocabulary import Vocabulary
from gguf_export.writer import ModelFile
from gguf_files.names import NOTE_KEY, SMALLTHINKER
from predictor.head.artifact import HeadArtifact


def write_one_expert(
    checkpoint: Checkpoint,
    vocabulary: Vocabulary,
    types: ExpertTypes,
    path: Path,
    target: Path,
    *,
    transposed: bool = False,
    head: HeadArtifact | None = None,
) -> HashedFile:
    """Write it; see `ModelFile.write` and `plan_expert`.

    Args:
        checkpoint: the model.
        vocabulary: its tokenizer.
        types: of its elements.
        path: where to write it, a temporary name.
        target: its final name, for messages.
        transposed: see `plan_expert`.
        head: the output head's predictor, which goes into the file.

    Returns:
        What was written, by the target's name.

    Raises:
        PspError: see `ModelFile.write`.
    """
    note, shape = shift_note(checkpoint), checkpoint.shape
    neurons = stored_neurons(shape.d_model, shape.d_ff) if transposed else shape.d_ff
    keys = bos_keys(checkpoint, vocabulary) | ({} if note is None else {NOTE_KEY: note})
    tensors = list(plan_expert(checkpoint, types, transposed=transposed, neurons=neurons))
    if head is not None:
        tensors = list(with_head_predictor(tensors, head, checkpoint))
    file = ModelFile(checkpoint, vocabulary, SMALLTHINKER, expert_sizes(shape, neurons))
    return file.write(path, target, keys, tensors)


def expert_sizes(shape: ModelShape, neurons: int) -> dict[str, int]:
    """Return the keys that make one expert of FFNs of so many neurons.

    The size of a head is among them where it does not follow from d_model.

    The weights of the experts that are used are divided by their sum, whatever the gating function
    (llama.cpp@0c1e570 src/models/smallthinker.cpp); softmax makes it 1 before already. A key of a
    sliding window would take the positions of some layers away, so there is none.
    """
    own = shape.n_heads * shape.head_dim != shape.d_model
    heads = ("attention.key_length", "attention.value_length") if own else ()
    return {
        **dict.fromkeys(heads, shape.head_dim),
        "expert_count": 1,
        "expert_used_count": 1,
        "expert_gating_func": int(ExpertGatingFuncType.SOFTMAX),
        "expert_feed_forward_length": neurons,
        "feed_forward_length": neurons,
    }
