"""Shard files, packed bits and importance codes, against plain loops."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import refused
from safetensors import safe_open
from safetensors.torch import load_file

from common.errors import TraceError
from predictor.collection.collect import collect, most_bytes
from predictor.collection.recorder import row_importance
from predictor.collection.settings import CollectConfig
from predictor.traces.packing import (
    active_places,
    codes_at,
    count_active,
    decode_importance,
    encode_importance,
    pack_active,
    pack_codes,
    pack_on_device,
    unpack_active,
)
from predictor.traces.shard_file import (
    INPUT_DTYPES,
    BatchRows,
    ShardLayout,
    ShardWriter,
    check_shard,
    read_shard,
    shard_counts,
)

PREFIX = 1024
PARTS = ("counts", "scale", "inputs", "active", "importance")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Rows:
    """Random rows before they are packed; those in `silent` have no active neuron."""

    layout: ShardLayout
    inputs: torch.Tensor
    active: torch.Tensor
    scale: torch.Tensor
    codes: torch.Tensor

    def batch(self, start: int, end: int) -> BatchRows:
        before, until = int(self.active[:start].sum()), int(self.active[:end].sum())
        bits = self.layout.importance_bits
        return BatchRows(
            inputs=self.inputs[start:end],
            active=pack_active(self.active[start:end]),
            counts=self.active[start:end].sum(0),
            scale=self.scale[start:end] if bits else torch.empty(0),
            codes=packed(self.codes[before:until], bits) if bits else torch.empty(0),
        )


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.from_numpy(pack_codes(codes.numpy(), bits))


def make_rows(
    rows: int = 23, d_model: int = 3, d_ff: int = 13, bits: int = 2, dtype: str = "float16"
) -> Rows:
    active = torch.rand(rows, d_ff, generator=seeded(1)) < 0.4
    active[::5] = False
    layout = ShardLayout(
        rows=rows, d_model=d_model, d_ff=d_ff, input_dtype=dtype, importance_bits=bits
    )
    codes = torch.randint(0, 2 ** max(bits, 1), (int(active.sum()),), generator=seeded(2))
    return Rows(
        layout=layout,
        inputs=torch.randn(rows, d_model, generator=seeded(3)).to(INPUT_DTYPES[dtype]),
        active=active,
        scale=torch.rand(rows, generator=seeded(4)),
        codes=codes.to(torch.uint8),
    )


def write(path: Path, rows: Rows, cuts: list[int]) -> str:
    with ShardWriter(path, rows.layout) as writer:
        for start, end in zip([0, *cuts], [*cuts, rows.layout.rows], strict=True):
            writer.append(rows.batch(start, end))
    return writer.digest


def packed_by_loop(codes: list[int], bits: int) -> list[int]:
    """Pack bit by bit: bit n of the stream is bit n % 8 of byte n // 8."""
    packed = [0] * -(-len(codes) * bits // 8)
    for place, code in enumerate(codes):
        for bit in range(bits):
            at = place * bits + bit
            packed[at // 8] |= (code >> bit & 1) << at % 8
    return packed


# --- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", INPUT_DTYPES)
@pytest.mark.parametrize("bits", [0, 2, 4, 8])
@pytest.mark.parametrize("d_ff", [1, 13, 16])
def test_a_shard_file_holds_every_row_as_plain_safetensors(
    tmp_path: Path, d_ff: int, bits: int, dtype: str
) -> None:
    rows = make_rows(d_ff=d_ff, bits=bits, dtype=dtype)
    digest = write(tmp_path / "one", rows, [])
    write(tmp_path / "many", rows, [1, 2, 2, 9, 10, 22])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()
    active = int(rows.active.sum())
    assert (tmp_path / "one").stat().st_size == rows.layout.size(active)
    found = load_file(tmp_path / "one")
    assert set(found) == set(PARTS)
    assert found["inputs"].dtype == INPUT_DTYPES[dtype]
    assert torch.equal(found["inputs"], rows.inputs)
    assert found["counts"].tolist() == [int(column.sum()) for column in rows.active.T]
    assert torch.equal(unpack_active(found["active"], d_ff), rows.active)
    if bits:
        assert torch.equal(found["scale"], rows.scale)
        assert found["importance"].tolist() == packed_by_loop(rows.codes.tolist(), bits)
    else:
        assert found["scale"].shape == found["importance"].shape == (0,)
    mapped = read_shard(tmp_path / "one", rows.layout)
    assert all(torch.equal(mapped[name], found[name]) for name in PARTS)
    assert torch.equal(shard_counts(tmp_path / "one"), found["counts"])
    assert check_shard(tmp_path / "one", rows.layout) == digest
    with safe_open(tmp_path / "one", framework="pt") as file:
        assert file.metadata() == {"xxh3_128": digest}


def test_parts_do_not_overlap_and_data_begins_at_a_multiple_of_eight(tmp_path: Path) -> None:
    write(tmp_path / "shard", make_rows(), [])
    content = (tmp_path / "shard").read_bytes()
    assert int.from_bytes(content[:8], "little") == PREFIX - 8
    header = json.loads(content[8:PREFIX])
    ends = [0] + [header[name]["data_offsets"][1] for name in PARTS]
    assert [header[name]["data_offsets"][0] for name in PARTS] == ends[:-1]
    assert len(content) == PREFIX + ends[-1]


def test_all_neurons_active_fill_the_most_that_a_shard_can_take(tmp_path: Path) -> None:
    rows = make_rows(bits=4)
    full = torch.ones_like(rows.active)
    rows = replace(rows, active=full, codes=torch.full((full.numel(),), 15, dtype=torch.uint8))
    write(tmp_path / "full", rows, [7])
    assert (tmp_path / "full").stat().st_size == rows.layout.size(full.numel())
    assert load_file(tmp_path / "full")["importance"].tolist()[:-1] == [255] * (23 * 13 // 2)


def test_a_file_that_was_not_finished_cannot_be_read(tmp_path: Path) -> None:
    rows = make_rows()

    def stop() -> None:
        with ShardWriter(tmp_path / "part", rows.layout) as writer:
            writer.append(rows.batch(0, 23))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    with refused(TraceError, str(tmp_path / "part"), "missing or damaged", "again"):
        read_shard(tmp_path / "part", rows.layout)


DAMAGES: dict[str, Callable[[int, int], int]] = {
    "one bit": lambda byte, place: byte ^ 1 << place % 8,
    "all bits": lambda byte, place: byte ^ 255,
    "a space": lambda byte, place: ord("\n"),
    "an I": lambda byte, place: ord("I"),
    "a U": lambda byte, place: ord("U"),
    "a 6": lambda byte, place: ord("6"),
}


def passes(path: Path, layout: ShardLayout) -> bool:
    """Whether a file passes the check; one that does not must be refused by name."""
    try:
        check_shard(path, layout)
    except TraceError as error:
        return str(path) not in str(error) or "\n" in str(error)
    return True


@pytest.mark.parametrize(("damage", "bits"), [*((damage, 2) for damage in DAMAGES), ("one bit", 0)])
def test_a_single_changed_byte_is_found_wherever_it_is(
    tmp_path: Path, damage: str, bits: int
) -> None:
    """Header and parts alike: a file that passes is the one that was written.

    What may read as other JSON is written over the header's text and the next spaces alone.
    """
    rows, path = make_rows(rows=7, bits=bits), tmp_path / "shard"
    write(path, rows, [])
    whole = path.read_bytes()
    end = len(whole) if damage.endswith(("bit", "bits")) else whole.index(b"}" + 9 * b" ") + 10
    missed = []
    for place, byte in enumerate(whole[:end]):
        changed = DAMAGES[damage](byte, place)
        if changed == byte:
            continue
        path.write_bytes(whole[:place] + bytes([changed]) + whole[place + 1 :])
        if passes(path, rows.layout):
            missed.append(whole[max(0, place - 12) : place] + b"<" + bytes([byte]) + b">")
    assert missed == []


def test_a_file_cut_or_grown_to_any_length_is_refused(tmp_path: Path) -> None:
    rows, path = make_rows(rows=7), tmp_path / "shard"
    write(path, rows, [])
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        for read in (read_shard, check_shard):
            with refused(TraceError, str(path), "again"):
                read(path, rows.layout)
    path.write_bytes(whole + b"\0")
    with refused(TraceError, str(path), "again"):
        read_shard(path, rows.layout)


@pytest.mark.parametrize("read", [read_shard, check_shard, lambda path, _: shard_counts(path)])
def test_a_file_that_is_not_there_is_named(
    tmp_path: Path, read: Callable[[Path, ShardLayout], object]
) -> None:
    for path in (tmp_path / "gone", tmp_path):
        with refused(TraceError, str(path), "missing or damaged", "again"):
            read(path, make_rows().layout)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("scale", {"rows": 22}),
        ("inputs", {"d_model": 4}),
        ("counts", {"d_ff": 14}),
        ("scale", {"importance_bits": 0}),
        ("importance", {"importance_bits": 4}),
        ("inputs", {"input_dtype": "bfloat16"}),
    ],
    ids=["rows", "d_model", "d_ff", "no importance", "more bits", "dtype"],
)
def test_a_file_of_another_layout_is_refused(
    tmp_path: Path, part: str, change: dict[str, int | str]
) -> None:
    rows = make_rows()
    write(tmp_path / "shard", rows, [])
    layout = ShardLayout(**(vars(rows.layout) | change))
    with refused(TraceError, str(tmp_path / "shard"), part, "again"):
        read_shard(tmp_path / "shard", layout)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_input_that_is_no_number_is_found(tmp_path: Path, value: float) -> None:
    rows = make_rows()
    rows.inputs[-1, 1] = value
    write(tmp_path / "shard", rows, [])
    with refused(TraceError, str(tmp_path / "shard"), "inputs hold NaN or inf"):
        check_shard(tmp_path / "shard", rows.layout)


def test_counts_that_are_not_those_of_the_bits_are_found(tmp_path: Path) -> None:
    """The checksum is right, the sum too: only counting the bits tells."""
    rows = make_rows()
    batch = rows.batch(0, 23)
    with ShardWriter(tmp_path / "shard", rows.layout) as writer:
        writer.append(replace(batch, counts=batch.counts.roll(1)))
    with refused(TraceError, str(tmp_path / "shard"), "counts differ from the active bits"):
        check_shard(tmp_path / "shard", rows.layout)


# --- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize(("rows", "d_ff"), [(1, 1), (17, 7), (17, 8), (5, 9), (3, 112), (4100, 5)])
def test_packed_bits_agree_with_plain_loops(rows: int, d_ff: int, density: float) -> None:
    active = torch.rand(rows, d_ff, generator=seeded(d_ff)) < density
    packed = pack_active(active)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [packed_by_loop([int(a) for a in row], 1) for row in active.tolist()]
    assert torch.equal(pack_on_device(active), packed)
    assert torch.equal(unpack_active(packed, d_ff), active)
    assert count_active(packed).tolist() == [sum(row) for row in active.tolist()]
    places = [(r, n) for r in range(rows) for n in range(d_ff) if active[r, n]]
    row, neuron = active_places(packed)
    assert row.dtype == neuron.dtype == torch.int64
    assert list(zip(row.tolist(), neuron.tolist(), strict=True)) == places


def test_the_least_significant_bit_comes_first() -> None:
    active = torch.tensor([[True, False, False, False, False, False, False, True, True]])
    assert pack_active(active).tolist() == [[0b10000001, 1]]


def test_columns_of_a_larger_tensor_are_packed_as_well() -> None:
    active = torch.rand(40, 9, generator=seeded()) < 0.5
    assert torch.equal(pack_active(active.T), pack_active(active.T.contiguous()))


# --- importance ----------------------------------------------------------------------------------

# Bits, octaves a step, and where the codes begin and end as powers of two.
SCALES = [(2, 2.0, -4, 4), (4, 1.0, -11, 5), (8, 0.125, -20, 12)]


@pytest.mark.parametrize(("bits", "step", "low", "high"), SCALES)
def test_codes_are_the_logarithm_in_equal_steps(
    bits: int, step: float, low: int, high: int
) -> None:
    codes = torch.arange(2**bits, dtype=torch.uint8)
    middles = decode_importance(codes, bits)
    assert torch.equal(encode_importance(middles, bits), codes)
    assert (middles.diff() > 0).all()
    values = torch.exp2(torch.linspace(low - 3, high + 3, 5001))
    coded = encode_importance(values, bits)
    assert coded.dtype == torch.uint8
    assert (coded.long().diff() >= 0).all(), "a larger importance never has a smaller code"
    assert sorted(set(coded.tolist())) == codes.tolist()
    inside = (values >= 2.0**low) & (values < 2.0**high)
    off = (decode_importance(coded, bits) / values).log2().abs()
    assert off[inside].max() <= step / 2 + 1e-4
    assert (coded[values < 2.0**low] == 0).all()
    assert (coded[values >= 2.0**high] == 2**bits - 1).all()


@pytest.mark.parametrize(
    ("value", "code"),
    [(0, 0), (0.249, 0), (0.25, 1), (0.999, 1), (1, 2), (3.99, 2), (4, 3), (1e30, 3)],
)
def test_two_bits_tell_quarters_of_the_mean(value: float, code: int) -> None:
    assert encode_importance(torch.tensor([value]), 2).item() == code


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 257])
def test_packed_codes_are_found_again_at_their_places(bits: int, count: int) -> None:
    codes = torch.randint(0, 2**bits, (count,), generator=seeded(count)).to(torch.uint8)
    packed = pack_codes(codes.numpy(), bits)
    assert packed.tolist() == packed_by_loop(codes.tolist(), bits)
    places = torch.randint(0, max(count, 1), (3 * count,), generator=seeded(1))
    assert torch.equal(codes_at(torch.from_numpy(packed), places, bits), codes[places])


@pytest.mark.parametrize("counts", [[], [0, 0], [1], [3, 0, 5, 0, 0, 1], [0, 40, 0]])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_row_importance_is_each_row_s_mean_and_shares(bits: int, counts: list[int]) -> None:
    values = torch.rand(sum(counts), generator=seeded(5)).exp() ** 3
    row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.long))
    scale, codes = row_importance(values, row, len(counts), bits)
    assert scale.dtype == torch.float32
    start = 0
    for number, count in enumerate(counts):
        own = values[start : start + count]
        mean = sum(own.tolist()) / count if count else 0.0
        assert scale[number].item() == pytest.approx(mean, rel=1e-6)
        expected = encode_importance(own / scale[number], bits)
        assert torch.equal(codes[start : start + count], expected)
        start += count
    assert len(codes) == start


def test_a_row_whose_active_neurons_add_nothing_has_the_lowest_codes() -> None:
    values, row = torch.tensor([0.0, 0.0, 2.0]), torch.tensor([0, 0, 1])
    scale, codes = row_importance(values, row, 2, 8)
    assert scale.tolist() == [0.0, 2.0]
    assert codes.tolist()[:2] == [0, 0]


# --- the size that is predicted ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "bits", "tokens", "factor"),
    [
        ("uneven", 0, 1, 2),
        ("uneven", 8, 50, 2),
        ("uneven", 0, 3000, 1.1),
        ("uneven", 2, 3000, 1.5),
        ("uneven", 4, 3000, 1.7),
        ("uneven", 8, 3000, 2),
        ("tiny", 2, 1, 2),
        ("tiny", 0, 3000, 1.1),
        ("tiny", 8, 3000, 2),
    ],
)
def test_no_store_is_larger_than_predicted_nor_much_smaller(
    settings: Callable[..., CollectConfig],
    tmp_path: Path,
    text: str,
    bits: int,
    tokens: int,
    factor: float,
) -> None:
    run = settings(tmp_path / "out", tokens=tokens, importance_bits=bits)
    if text == "tiny":
        (tmp_path / "tiny.jsonl").write_text('{"body": "a"}\n' * 1500)
        run = replace(run, data=str(tmp_path / "tiny.jsonl"))
    store = collect(run)
    assert store.rows == tokens
    real = sum(path.stat().st_size for path in run.directory.rglob("*") if path.is_file())
    assert real <= most_bytes(store.header, tokens) < factor * real
