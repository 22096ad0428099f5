"""What an exported file gives the cost model: its bytes, and where PowerInfer would put them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from common.errors import EngineError
from cost_model.model_bytes import Activity, LayerBytes, LayerPlace, ModelBytes, Place
from gguf_export.gpu_split import captured_share, choose_neurons
from gguf_export.pwri.dense_layers import dense_layers
from gguf_export.pwri.gpu_index import file_groups
from gguf_export.pwri.hyperparameters import Hyperparameters, read_hyperparameters
from gguf_export.pwri.memory_plan import MemorySettings, plan_memory
from gguf_export.pwri.schema import EMBEDDING, FC1, FC2, HEAD, parse_name
from gguf_export.pwri.statistics import read_statistics
from gguf_files.reader import GGUFFile
from results.bench import Bench
from results.estimate import PlacementFacts
from results.parts import Metrics

if TYPE_CHECKING:
    import torch


PASS_BENCH = "pass a bench.json of psp bench-powerinfer, or --density"


@dataclass(frozen=True)
class Placement:
    """Where everything lies under a budget.

    Attributes:
        place: for the cost model.
        facts: for readers.
    """

    place: Place
    facts: PlacementFacts


class EstimatedFile:
    """The header of a sparse file, and the statistics beside it if a GPU needs them."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            FormatError: not a sparse file, damaged, or a tensor is missing.
        """
        self.path = path
        self.file = GGUFFile(path)
        self.hyper: Hyperparameters = read_hyperparameters(self.file)
        self.bytes = _model_bytes(self.file, self.hyper)

    @property
    def everything(self) -> int:
        """Bytes of VRAM at which all that PowerInfer would place fits, without the KV cache."""
        plan = plan_memory(self.file.tensors.values(), self._settings(0, 1))
        return self.but_neurons + sum(self.hyper.d_ff * each for each in plan.bytes_per_neuron)

    @property
    def but_neurons(self) -> int:
        """Bytes of all that PowerInfer places before neurons, without the KV cache."""
        total = sum(info.size for info in self.file.tensors.values())
        # With a context of one token the cache cannot keep what follows from being placed.
        plan = plan_memory(self.file.tensors.values(), self._settings(2 * total, 1))
        return sum(_size(self.file, name) for name in plan.offloaded)

    def kv_cache(self, context: int) -> int:
        """Return the bytes of the KV cache."""
        return 2 * self._settings(0, context).kv_half

    def place(self, budget: int, context: int) -> Placement:
        """Follow PowerInfer's placement and our choice of neurons (`psp gpu-split`).

        Raises:
            PspError: a tensor that PowerInfer does not know, or no statistics beside the file.
        """
        plan = plan_memory(self.file.tensors.values(), self._settings(budget, context))
        groups = file_groups(self.file)
        chosen = choose_neurons(
            self.statistics, plan.bytes_per_neuron, plan.ffn_budget, groups=groups
        )
        offloaded = set(plan.offloaded)
        layers = tuple(
            self._layer_place(number, offloaded, chosen[number])
            for number in range(self.hyper.n_layers)
        )
        return Placement(
            place=Place(
                layers=layers,
                head=self.hyper.graph.own_head and HEAD in offloaded,
                kv=plan.kv_halves / 2,
            ),
            facts=PlacementFacts(
                everything_but_ffn_fits=plan.complete,
                kv_cache_in_vram=plan.kv_halves == 2,
                neuron_share_on_gpu=fmean(layer.neurons for layer in layers),
                activation_share_on_gpu=captured_share(self.statistics, chosen),
            ),
        )

    def stated_activity(self, activity: Activity) -> tuple[Activity, ...]:
        """Return the activity of each layer: the same, but all neurons of dense layers."""
        dense, layers = dense_layers(self.file), range(self.hyper.n_layers)
        return tuple(activity.all_neurons if n in dense else activity for n in layers)

    def measured_activity(self, bench: Bench, source: str) -> tuple[Activity, ...]:
        """Return how many neurons of each layer a benchmark saw computed.

        Args:
            bench: of this model.
            source: where it comes from, for errors.

        Raises:
            EngineError: it has another number of layers.
        """
        found, expected = len(bench.layers), self.hyper.n_layers
        if found != expected:
            problem = f"{source}: {found} layers, the model has {expected}"
            raise EngineError(problem, PASS_BENCH)
        return tuple(_activity(layer) for layer in bench.layers)

    @cached_property
    def statistics(self) -> Sequence[torch.Tensor]:
        """How often each neuron was active, per layer (d_ff,) int64."""
        return read_statistics(self.path.parent, self.hyper.n_layers, self.hyper.d_ff)

    def _layer_place(self, layer: int, offloaded: set[str], chosen: torch.Tensor) -> LayerPlace:
        counts = self.statistics[layer]
        names = [name for name in self.file.tensors if name.startswith(f"blk.{layer}.attn_")]
        there = sum(_size(self.file, name) for name in names if name in offloaded)
        total = sum(_size(self.file, name) for name in names)
        return LayerPlace(
            attention=there / total if total else 0.0,
            fc1=FC1.format(layer=layer) in offloaded,
            fc2=FC2.format(layer=layer) in offloaded,
            neurons=float(chosen.double().mean()),
            activations=captured_share([counts], [chosen]),
        )

    def _settings(self, budget: int, context: int) -> MemorySettings:
        return MemorySettings.of(self.hyper, budget=budget, n_ctx=context)


def _size(file: GGUFFile, name: str) -> int:
    info = file.tensors.get(name)
    if info is None:
        raise file.error(f"tensor {name} is missing")
    return info.size


def _model_bytes(file: GGUFFile, hyper: Hyperparameters) -> ModelBytes:
    others = [0] * hyper.n_layers
    for name, info in file.tensors.items():
        found = parse_name(name)
        apart = found.neurons or found.role == "predictor"
        if not apart and found.layer is not None and found.layer < hyper.n_layers:
            others[found.layer] += info.size
    head = HEAD if hyper.graph.own_head else EMBEDDING
    head_bytes = _size(file, head)
    norms = sum(i.size for n, i in file.tensors.items() if parse_name(n).stem == "output_norm")
    return ModelBytes(
        d_model=hyper.d_model,
        n_vocab=file.tensors[head].shape[0],
        layers=tuple(_layer_bytes(file, hyper, n, other) for n, other in enumerate(others)),
        head=head_bytes + norms,
        # The cache is F16 unless PowerInfer is told otherwise (`--memory-f32`).
        kv_token=2 * 2 * hyper.n_kv_heads * hyper.head_dim,
    )


def _layer_bytes(file: GGUFFile, hyper: Hyperparameters, layer: int, others: int) -> LayerBytes:
    def matrix(stem: str) -> int:
        return _size(file, f"blk.{layer}.{stem}.weight")

    gated, d_ff = hyper.graph.gated, hyper.d_ff
    rows = matrix("ffn_up") + (matrix("ffn_gate") if gated else 0)
    return LayerBytes(
        attention=others,
        fc1=matrix("fc1"),
        fc2=matrix("fc2"),
        neuron_rows=rows // d_ff,
        neuron_column=matrix("ffn_down_t") // d_ff,
        d_ff=d_ff,
        gated=gated,
    )


def _activity(layer: Metrics) -> Activity:
    """Return a layer's activity; shares may end beside 1, as sums of floats do."""
    predicted = max(0.0, 1 - layer.predicted_sparsity)
    # Of no predicted neuron there is no precision.
    both = predicted * min(1.0, layer.precision) if predicted else 0.0
    return Activity(predicted=predicted, both=both, active=max(both, 1 - layer.activation_sparsity))
