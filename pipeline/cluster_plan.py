"""`psp estimate --cluster`: collecting and training on a Ray cluster, from sizes and rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.element_types import ELEMENT_TYPES
from common.files import refuse_existing
from common.lock import locked
from common.version import tool_version
from cost_model.cluster import Cluster, load_cluster
from cost_model.cluster_plan import Work, scaling, stops
from pipeline.cluster_rates import (
    ASSUMED,
    DISPATCH,
    FIRST_LAYER,
    IMPORTS,
    LAYER_COMMIT,
    MEASURED,
    RAY,
    RECORDED,
    SHARD_COMMIT,
    SHARD_LAYER,
    SHARD_SEGMENT,
    WRITER,
    Held,
    PlannedModel,
    TrainingRates,
)
from pipeline.cluster_settings import ClusterConfig
from pipeline.costs import MEASUREMENTS, layer_seconds
from predictor.collection.collect import usual_shard_rows
from predictor.collection.settings import CollectConfig
from predictor.size import Size
from predictor.training.bounds import bound_of
from predictor.training.checks import check_ranks
from predictor.training.settings import RECIPES, possible_sizes
from results.cluster import CLUSTER, ClusterPlan, JobPlan

NODES = (1, 2, 4, 8, 16, 32, 64)
_MOST_ACTIVE = 0.5


def plan_cluster(config: ClusterConfig) -> ClusterPlan:
    """Plan a collection and a training; nothing is run.

    Returns:
        What cluster.json holds; see docs/estimate.md.

    Raises:
        PspError: a damaged config or description, a block that no worker holds, an existing output.
    """
    if config.out is not None:
        refuse_existing(config.out / CLUSTER.name, force=config.force)
    model, cluster = PlannedModel.open(config.model), load_cluster(config.cluster, config.threads)
    shape, training = model.shape, config.training
    rows = int(config.tokens * (1 - training.holdout))
    check_ranks(training, shape.n_layers, shape.d_model, rows, config.model)
    case = _Case(config=config, model=model, cluster=cluster, held=Held.of(model, cluster))
    found = ClusterPlan(
        tool_version=tool_version(),
        model=config.model,
        sizes={key: getattr(shape, key) for key in ("d_model", "d_ff", "n_layers", "vocab_size")},
        tokens=config.tokens,
        cluster=cluster,
        jobs={"collect": case.collect(), "train-predictor": case.train()},
        measured=MEASURED,
        assumptions=tuple(case.assumptions()),
    )
    if config.out is not None:
        with locked(config.out):
            CLUSTER.write(config.out, found)
    return found


@dataclass(frozen=True, kw_only=True)
class _Case:
    """All that the figures of a plan share.

    Attributes:
        config: what was asked for.
        model: the model.
        cluster: what it runs on.
        held: how the cluster's workers hold it.
    """

    config: ClusterConfig
    model: PlannedModel
    cluster: Cluster
    held: Held

    @property
    def context(self) -> int:
        """Tokens of a window."""
        return min(self.config.context, self.model.shape.context_length)

    @property
    def row(self) -> float:
        """Bytes of a token in a layer's traces."""
        active = _MOST_ACTIVE if self.config.active is None else self.config.active
        return self.model.trace_row(active, CollectConfig.importance_bits)

    @property
    def share(self) -> float:
        """Bytes a second that a worker gets of its node's network."""
        return self.cluster.network / self.cluster.workers_per_node

    @property
    def weights(self) -> float:
        """Bytes of a layer's gate and norms in the traces."""
        shape = self.model.shape
        return 2 * shape.d_model * shape.d_ff + 4 * shape.d_ff

    def collect(self) -> JobPlan:
        """Return the plan of the collection."""
        shape, held = self.model.shape, self.held
        rows = min(usual_shard_rows(shape), self.config.tokens)
        shards = -(-self.config.tokens // rows)
        layers = shape.n_layers / held.stages
        computing = rows * layers * self.model.operations(self.context) / self.cluster.compute
        written, passed = rows * layers * self.row, rows * shape.d_model * held.width
        parts = {"computing": RECORDED * computing + DISPATCH, "network": written / self.share}
        if self.cluster.on_gpu:
            parts["writing rows"] = written / WRITER
        if held.stages > 1:
            parts["passing residuals on"] = passed / self.share
        segments = self.config.tokens / self.context
        work = Work(
            name="shards",
            items=shards,
            parts=parts,
            overlapped=self.cluster.on_gpu,
            stages=held.stages,
            driver=SHARD_COMMIT + shape.n_layers * SHARD_LAYER + SHARD_SEGMENT * segments / 2,
            start=RAY + IMPORTS,
            loaded=held.loaded,
            written=rows * shape.n_layers * self.row,
            crossed=(held.stages - 1) * passed,
        )
        gates = shape.n_layers * self.weights
        disk = self.config.tokens * shape.n_layers * self.row + gates
        return self._job([work], disk, gates, gates / self.cluster.network)

    def train(self) -> JobPlan:
        """Return the plan of the training, which ends with measuring its bound."""
        shape, training = self.model.shape, self.config.training
        rows = int(self.config.tokens * (1 - training.holdout))
        works, predictors = [self._layers(rows)], sum(map(self._predictor, range(shape.n_layers)))
        bound = bound_of(training)
        if bound is not None and bound.max_ppl_gap is not None:
            works.append(self._passes(min(training.eval_tokens, self.config.tokens - rows)))
        return self._job(works, predictors, 0.0, 0.0)

    def _layers(self, rows: int) -> Work:
        shape = self.model.shape
        read = self.config.tokens * self.row + self.weights
        seconds = [self._layer_seconds(layer, rows) for layer in range(shape.n_layers)]
        return Work(
            name="layers",
            items=shape.n_layers,
            parts={
                "training": sum(seconds) / len(seconds) + DISPATCH,
                "network": read / self.share,
            },
            driver=LAYER_COMMIT,
            start=RAY + IMPORTS + FIRST_LAYER * self.cluster.on_gpu,
            read=read,
            written=self._predictor(0),
        )

    def _sizes(self, layer: int) -> list[Size]:
        training = self.config.training
        bounded, d_model = bound_of(training) is not None, self.model.shape.d_model
        return possible_sizes(training, d_model, layer, bounded=bounded)

    def _layer_seconds(self, layer: int, rows: int) -> float:
        training, sizes = self.config.training, self._sizes(layer)
        recipe, widest = RECIPES[training.recipe], max(sizes, key=lambda size: size.rank)
        rates = TrainingRates.of(self.model.shape, widest, recipe, self.cluster)
        return layer_seconds(training, sizes, rows, rates.fixed, rates.row)

    def _predictor(self, layer: int) -> float:
        """Return the bytes of a layer's predictor at most."""
        shape = self.model.shape
        most = max(ELEMENT_TYPES[size.kind].width * size.rank for size in self._sizes(layer))
        return 2 * most * (shape.d_model + shape.d_ff)

    def _passes(self, tokens: int) -> Work:
        """Return the model's passes over the held-out text, window by window."""
        held, model = self.held, self.model
        window = min(self.context, max(tokens, 1))
        layers = model.shape.n_layers * model.operations(self.context)
        operations = window * (layers + model.head_operations) / held.stages
        parts = {"computing": operations / self.cluster.compute}
        passed = window * model.shape.d_model * held.width
        if held.stages > 1:
            parts["passing residuals on"] = passed / self.share
        return Work(
            name="windows",
            items=max(1, tokens // window),
            rounds=1 + MEASUREMENTS,
            parts=parts,
            overlapped=self.cluster.on_gpu,
            stages=held.stages,
            start=IMPORTS,
            loaded=held.loaded,
            crossed=(held.stages - 1) * passed,
        )

    def _job(self, works: Sequence[Work], disk: float, sent: float, driver: float) -> JobPlan:
        """Return a plan.

        Args:
            works: what workers do, in order.
            disk: bytes that the command leaves.
            sent: bytes that the driver sends beside the items.
            driver: seconds that it takes for that.
        """
        cluster = self.cluster
        (here,) = scaling(works, cluster, [cluster.nodes], driver)
        return JobPlan(
            seconds=here.seconds,
            limit=here.limit,
            disk_bytes=disk,
            network_bytes=sent + sum(work.network_bytes(cluster) for work in works),
            items={work.name: work.items for work in works},
            stages=max(work.stages for work in works),
            item_seconds={work.name: work.parts for work in works},
            scaling=tuple(scaling(works, cluster, [*NODES, cluster.nodes], driver)),
            stops=tuple(
                sorted(
                    (stop for work in works for stop in stops(work, cluster)),
                    key=lambda stop: stop.workers,
                )
            ),
        )

    def assumptions(self) -> list[str]:
        """Return what was taken for granted."""
        lines = [*self.cluster.assumed, *ASSUMED]
        if self.config.active is None:
            lines.append(f"{_MOST_ACTIVE:.0%} of all neurons are active, the most that is seen")
        if self.held.stages > 1:
            lines.append(
                f"{self.held.stages} workers hold the model together, and pass residuals on over "
                "the network"
            )
        lines.append("a document is a window long; text is read and cut while models run")
        return [*lines, "the perplexity that a bound keeps is measured by all workers"]
