"""The roofline: cases by hand, conservation, and which way it must move."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_model.hardware import Device, Efficiency, Hardware, Link
from cost_model.model_bytes import (
    Activity,
    LayerBytes,
    LayerPlace,
    ModelBytes,
    Place,
    dense_offload,
    on_cpu,
)
from cost_model.roofline import (
    Cost,
    Crossing,
    best_dense,
    dense_token,
    layer_crossing,
    sparse_token,
)

GB = 10**9
EXACT = Efficiency(matrix=1.0, rows=0.5, columns=0.25)
# Bytes: attention 2 GB; predictor 1 GB; FFN 1000 · (4 + 2) MB = 6 GB.
LAYER = LayerBytes(
    attention=2 * GB,
    fc1=GB // 4,
    fc2=3 * GB // 4,
    neuron_rows=4_000_000,
    neuron_column=2_000_000,
    d_ff=1000,
    gated=True,
)
MODEL = ModelBytes(d_model=100, n_vocab=500, layers=(LAYER, LAYER), head=3 * GB, kv_token=10**6)
HALF = Activity(predicted=0.5, both=0.25, active=0.3)


def device(
    bandwidth: float, layer_seconds: float = 0.0, dense_layer_seconds: float | None = None
) -> Device:
    return Device(
        name="made up",
        bandwidth=bandwidth,
        memory=100 * GB,
        efficiency=EXACT,
        layer_seconds=layer_seconds,
        dense_layer_seconds=dense_layer_seconds,
    )


def machine(*, gpu: float | None = None, layer: float = 0.0, copy: float = 0.0) -> Hardware:
    link = Link(bandwidth=1e12, efficiency=0.5, copy_seconds=copy)
    return Hardware(
        name="made up",
        cpu=device(1 * GB, layer),
        gpu=None if gpu is None else device(gpu, layer),
        link=None if gpu is None else link,
    )


def everywhere(**changes: Any) -> Place:
    settings: dict[str, Any] = {
        "attention": 1.0,
        "fc1": True,
        "fc2": True,
        "neurons": 1.0,
        "activations": 1.0,
    }
    return Place(layers=(LayerPlace(**(settings | changes)),) * 2, head=True, kv=1.0)


def sparse(place: Place, hardware: Hardware, activity: Activity = HALF, position: int = 0) -> Cost:
    return sparse_token(MODEL, place, hardware, (activity,) * 2, position)


def test_a_sparse_token_on_the_cpu_by_hand() -> None:
    cost = sparse(on_cpu(2), machine(layer=0.125), position=1000)
    # Each layer keeps 1 GB of keys and values; rows 0.5 · 4 GB at half speed, columns 0.25 · 2 GB
    # at a quarter.
    expected = {
        "attention": 2 * (2 + 1),
        "predictor": 2 * 1,
        "ffn_hot": 0,
        "ffn_cold": 2 * (4 + 2),
        "head": 3,
        "link": 0,
        "overhead": 2 * 0.125,
        "overlap": 0,
    }
    assert cost.parts == pytest.approx(expected)
    assert cost.seconds == pytest.approx(23.25)
    assert cost.tokens_per_second == pytest.approx(1 / 23.25)
    assert cost.read["CPU"] == pytest.approx((6 + 2 + 2 * 2.5 + 3) * GB)


def test_all_neurons_read_every_row_and_the_active_columns() -> None:
    cost = sparse(on_cpu(2), machine(), HALF.all_neurons)
    assert cost.parts["ffn_cold"] == pytest.approx(2 * (4 / 0.5 + 0.3 * 2 / 0.25))
    assert cost.parts["predictor"] == pytest.approx(2)


def test_a_dense_token_by_hand() -> None:
    cost = dense_token(MODEL, 0, machine(), position=0)
    assert cost.seconds == pytest.approx(2 * (2 + 6) + 3)
    one = dense_token(MODEL, 1, machine(gpu=8 * GB), position=0)
    assert one.parts["ffn_hot"] == pytest.approx(6 / 8)
    assert one.parts["ffn_cold"] == pytest.approx(6)
    assert one.parts["attention"] == pytest.approx(2 + 2 / 8)
    assert one.parts["head"] == pytest.approx(3)
    assert dense_token(MODEL, 3, machine(gpu=8 * GB), 0).parts["head"] == pytest.approx(3 / 8)


def test_what_a_layer_and_a_token_cost_beside_their_reads() -> None:
    hardware = replace(
        machine(gpu=8 * GB, layer=0.125),
        gpu=device(8 * GB, layer_seconds=0.5, dense_layer_seconds=0.0625),
        threads=3,
        thread_seconds=0.125,
    )
    split = sparse(everywhere(neurons=0.5), hardware)
    free = sparse(everywhere(neurons=0.5), machine(gpu=8 * GB))
    # Of each layer attention and the hot neurons are the GPU's, half a layer each, and the cold
    # ones half a layer of the CPU's.
    assert split.parts["overhead"] == pytest.approx(2 * (0.5 + 0.125 / 2) + 0.25)
    assert split.devices["GPU"] - free.devices["GPU"] == pytest.approx(2 * 0.5)
    assert split.devices["CPU"] - free.devices["CPU"] == pytest.approx(0.125 + 0.25)
    # A dense engine has its own time for a layer where one is told, and none for a token.
    assert dense_token(MODEL, 1, hardware, 0).parts["overhead"] == pytest.approx(0.125 + 0.0625)


def test_hot_and_cold_neurons_work_at_the_same_time() -> None:
    place = everywhere(neurons=0.5, activations=0.8)
    cost = sparse(place, machine(gpu=8 * GB))
    # Rows: 0.4 of 4 GB on the GPU at 4 GB/s, 0.1 on the CPU at 0.5 GB/s: 0.4 against 0.8 s.
    # Columns: 0.2 of 2 GB at 2 GB/s, 0.05 at 0.25 GB/s: 0.2 against 0.4 s. The CPU takes longer.
    assert cost.parts["ffn_hot"] == pytest.approx(2 * (0.4 + 0.2))
    assert cost.parts["ffn_cold"] == pytest.approx(2 * (0.8 + 0.4))
    assert cost.parts["overlap"] == pytest.approx(-2 * (0.4 + 0.2))


@pytest.mark.parametrize(
    ("neurons", "activations", "computed", "hot"),
    [
        (0.0, 0.0, 0.5, 0.0),
        (1.0, 1.0, 0.5, 0.5),
        (0.2, 0.9, 0.1, 0.09),
        (0.2, 0.9, 0.5, 0.2),  # no more than there are
        (0.2, 0.9, 1.0, 0.2),
        (0.9, 0.5, 0.8, 0.7),  # nor more on the CPU than are there
    ],
)
def test_computed_neurons_fall_where_there_are_so_many(
    neurons: float, activations: float, computed: float, hot: float
) -> None:
    place = LayerPlace(neurons=neurons, activations=activations)
    assert place.hot(computed) == pytest.approx(hot)


def test_nothing_crosses_for_a_layer_on_one_side() -> None:
    assert layer_crossing(LAYER, LayerPlace(), 100, 0.0) == Crossing()
    assert layer_crossing(LAYER, everywhere().layers[0], 100, 1.0) == Crossing()


def test_what_crosses_for_a_split_layer() -> None:
    place = everywhere(neurons=0.5).layers[0]
    # Vectors of d_model = 100: three for the norm, two inputs, one merge of down. Of d_ff = 1000:
    # logits, the halves and sums of gate and up, the activations. Logits of half of the neurons are
    # read by three kernels.
    expected = Crossing(4 * (6 * 100 + 6 * 1000) + 4 * 3 * 500, 12)
    assert layer_crossing(LAYER, place, 100, 1.0) == expected
    cold = replace(place, neurons=0.0, activations=0.0)
    assert layer_crossing(LAYER, cold, 100, 1.0) == Crossing(4 * (4 * 100 + 1000), 5)
    without_gate = layer_crossing(replace(LAYER, gated=False), place, 100, 1.0)
    assert without_gate == Crossing(4 * (5 * 100 + 4 * 1000) + 4 * 2 * 500, 9)


def test_a_predictor_left_behind_comes_over_with_every_token() -> None:
    place = everywhere(fc1=False, fc2=False, neurons=0.0, activations=0.0).layers[0]
    assert layer_crossing(LAYER, place, 100, 1.0).size > LAYER.fc1
    cost = sparse(Place(layers=(place,) * 2), machine(gpu=1e15))
    assert cost.read["link"] > 2 * LAYER.fc1


def test_the_embedding_goes_in_and_the_logits_come_out() -> None:
    whole, hardware = everywhere(), machine(gpu=8 * GB)
    assert sparse(whole, hardware).read["link"] == 4 * (100 + 500)
    assert sparse(replace(whole, head=False), hardware).read["link"] == 4 * (100 + 100)
    assert sparse(on_cpu(2), hardware).read["link"] == 0


def test_copies_cost_what_the_link_says() -> None:
    place = everywhere(neurons=0.5)
    free, slow = (sparse(place, machine(gpu=8 * GB, copy=copy)) for copy in (0.0, 1e-3))
    # 12 of each split layer, the embedding and the logits.
    assert slow.parts["link"] - free.parts["link"] == pytest.approx(26e-3)


@pytest.mark.parametrize(
    ("budget", "count"),
    [(0, 0), (8 * GB - 1, 0), (8 * GB, 1), (16 * GB, 2), (19 * GB - 1, 2), (19 * GB, 3)],
)
def test_whole_layers_are_offloaded_densely(budget: int, count: int) -> None:
    assert dense_offload(MODEL, budget, context=0) == count
    assert best_dense(MODEL, machine(gpu=GB), budget, 0, 0)[0] == count
    assert best_dense(MODEL, machine(), budget, 0, 0)[0] == 0


def test_a_dense_layer_takes_its_part_of_the_cache_along() -> None:
    assert dense_offload(MODEL, 8 * GB, context=1) == 0
    assert dense_offload(MODEL, 8 * GB + 10**6, context=1) == 1


def test_what_a_byte_of_a_neuron_costs() -> None:
    costs = machine(gpu=10 * GB).neuron_byte_seconds()
    assert costs["cpu"] == pytest.approx((2 / 3 / 0.5 + 1 / 3 / 0.25) / GB)
    assert costs["gpu"] == pytest.approx(costs["cpu"] / 10)
    # Predictors are dense products: in VRAM if there is any, else beside the neurons.
    product, gpu = machine().cpu.seconds(matrix=1), machine(gpu=10 * GB)
    assert machine().predictor_weight == pytest.approx(product / costs["cpu"])
    assert gpu.predictor_weight == pytest.approx(product / 10 / costs["cpu"])


shares = st.floats(0, 1)
activities = st.tuples(shares, shares, shares).map(
    lambda each: Activity(
        predicted=each[0], both=each[0] * each[1], active=max(each[0] * each[1], each[2])
    )
)
layer_places = st.builds(
    LayerPlace,
    attention=shares,
    fc1=st.booleans(),
    fc2=st.booleans(),
    neurons=shares,
    activations=shares,
)
places = st.builds(
    Place,
    layers=st.tuples(layer_places, layer_places),
    head=st.booleans(),
    kv=st.sampled_from([0.0, 0.5, 1.0]),
)


@given(places, activities, st.floats(1e6, 1e13), st.integers(0, 4096))
def test_parts_and_devices_add_up_to_the_token(
    place: Place, activity: Activity, gpu: float, position: int
) -> None:
    cost = sparse(place, machine(gpu=gpu, layer=1e-5, copy=1e-6), activity, position)
    assert cost.seconds == pytest.approx(sum(cost.devices.values()) + cost.parts["overlap"])
    assert all(value >= 0 for part, value in cost.parts.items() if part != "overlap")
    assert cost.parts["overlap"] <= 0
    assert -cost.parts["overlap"] <= min(cost.parts["ffn_hot"], cost.parts["ffn_cold"]) * (1 + 1e-9)
    # Every weight is read once, on whichever side; fc1 may cross besides.
    computed = LAYER.d_ff * (
        LAYER.neuron_rows * activity.predicted + LAYER.neuron_column * activity.both
    )
    read = 2 * (LAYER.attention + LAYER.predictor + computed + 10**6 * position) + MODEL.head
    assert cost.read["CPU"] + cost.read["GPU"] == pytest.approx(read)


@given(places, activities, activities)
def test_more_neurons_are_never_faster(place: Place, one: Activity, other: Activity) -> None:
    hardware = machine(gpu=20 * GB)
    less = Activity(
        predicted=min(one.predicted, other.predicted), both=min(one.both, other.both), active=1
    )
    more = Activity(
        predicted=max(one.predicted, other.predicted), both=max(one.both, other.both), active=1
    )
    slower, faster = sparse(place, hardware, more).seconds, sparse(place, hardware, less).seconds
    assert slower >= faster * (1 - 1e-9)


@given(activities, shares, shares, st.floats(0, 1))
def test_more_vram_is_never_slower_but_for_copies(
    activity: Activity, neurons: float, activations: float, step: float
) -> None:
    """With a GPU that is never waited for; otherwise the CPU's help can be worth more."""
    hardware = machine(gpu=1e15)
    activations = max(neurons, activations)
    more = neurons + step * (1 - neurons), activations + step * (1 - activations)
    before, after = (
        sparse(everywhere(neurons=n, activations=a), hardware, activity).parts
        for n, a in ((neurons, activations), more)
    )
    total = [sum(parts.values()) - parts["link"] for parts in (before, after)]
    assert total[1] <= total[0] * (1 + 1e-6) + 1e-4
