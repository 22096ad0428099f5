"""Names of tensors: what is known of PowerInfer's own, and what is told of others'."""

from __future__ import annotations

import pytest

from gguf_export.pwri.schema import STEMS, parse_name


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_powerinfer_s_tensors_are_known_where_they_belong(stem: str, part: str) -> None:
    names = [f"blk.12.{stem}.{part}", f"{stem}.{part}"]
    inside, outside = (parse_name(name) for name in names)
    right, wrong = (inside, outside) if STEMS[stem].per_layer else (outside, inside)
    assert (right.stem, right.part) == (stem, part)
    assert (inside.layer, outside.layer) == (12, None)
    assert right.known == STEMS[stem]
    assert right.role == STEMS[stem].role
    assert right.neurons == (STEMS[stem].role == "ffn" and part == "weight")
    assert wrong.known is None
    assert not wrong.neurons


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("blk.0.ffn_down.weight", "ffn"),
        ("blk.0.ffn_gate.3.weight", "ffn"),
        ("blk.0.attn_q_norm.weight", "norm"),
        ("token_embd_norm.bias", "norm"),
        ("blk.7.attn_rot_embd.weight", "attention"),
        ("blk.7.attn_sinks", "attention"),
        ("rope_freqs.weight", None),
        ("blk.0.ssm_a", None),
        ("blk.x.attn_q.weight", None),
        ("blk.99999999999999999999.attn_q.weight", None),
        ("attn_q.weight", None),
        ("blk.0.attn_q.weight\n", "attention"),
        ("blk.", None),
        (".weight", None),
        ("\n", None),
        ("", None),
    ],
)
def test_others_tensors_are_told_by_llama_cpp_s_way_of_naming(name: str, role: str | None) -> None:
    parsed = parse_name(name)
    assert parsed.known is None
    assert parsed.role == role


def test_layers_of_a_level_lie_together() -> None:
    """PowerInfer's order within a layer is that of the table."""
    levels = [stem.level for stem in STEMS.values() if stem.level is not None]
    assert levels == sorted(levels)
