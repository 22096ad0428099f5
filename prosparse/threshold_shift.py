"""Activation threshold shift: FATReLU's threshold for the most sparsity within a perplexity bound.

Source: arXiv 2402.13516 §3.3: ReLU becomes FATReLU, `x if x >= T else 0`, with one positive T for
the whole model, chosen so that performance hardly suffers. The paper tried values; here T is
searched.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from common.errors import SparsityError
from common.lock import locked
from prosparse.activation import Opened, has_one_gate, open_any, shifted
from prosparse.gate_statistics import gate_statistics
from prosparse.measurement import Measurement
from prosparse.settings import SparsityConfig
from prosparse.shifted_checkpoint import check_out, write_shifted
from prosparse.sparsity import Note, SparsityResult, load, refuse_fatrelu, search_facts

_STEPS = 128
"""Shares of active neurons that are tried: multiples of 1/128, seven measurements."""


def shift(config: SparsityConfig, note: Note = lambda line: None) -> SparsityResult:
    """Search the threshold, and write the model that has it.

    Returns:
        What ReLU, every `config.thresholds` and the setting found do; it comes last, measured from
        the files if they were written.

    Raises:
        SparsityError: not a ReLU or FATReLU model with one gate, or the bound is out of reach.
        PspError: the model or the text cannot be used, or `out` may not be written.
    """
    with nullcontext() if config.out is None else locked(config.out):
        return _shift(config, note)


def _shift(config: SparsityConfig, note: Note) -> SparsityResult:
    bound = config.max_ppl_gap
    assert bound is not None
    opened = _open_sparse(config.model)
    if config.out is not None:
        check_out(config.out, opened.checkpoint, config.force)
    model = load(opened, config, note)
    layers = opened.checkpoint.shape.n_layers
    base, statistics = gate_statistics(model)
    thresholds = statistics.each if config.per_layer else statistics.common
    tried: list[Measurement] = []

    def measure(share: float) -> Measurement:
        tried.append(model.measure(shifted(thresholds(share))))
        note(_told(tried[-1], base))
        return tried[-1]

    found = largest_within(measure, lambda m: m.gap(base), bound)
    asked = [model.measure(shifted((t,) * layers)) for t in sorted(set(config.thresholds)) if t]
    last = found
    if config.out is not None:
        facts = search_facts(config, found)
        write_shifted(opened.checkpoint, found.setting.thresholds, config.out, facts)
        last = _as_written(config)
    return SparsityResult(
        config=config,
        own=opened.own,
        measured=(base, *asked, last),
        tried=tuple(tried),
        found=found,
    )


def _as_written(config: SparsityConfig) -> Measurement:
    """Measure the model once more from its files."""
    written = open_any(str(config.out))
    model = load(written, config, lambda line: None)
    return model.measure(written.own)


def largest_within(
    measure: Callable[[float], Measurement],
    gap: Callable[[Measurement], float],
    bound: float,
) -> Measurement:
    """Return the measurement with the largest share turned off whose gap is within the bound.

    The gap is taken to rise with the share; what is returned was measured, whether it does or not.

    Args:
        measure: runs the model with a share, between 0 and 1, of its active neurons turned off.
        gap: of a measurement.
        bound: largest gap.

    Raises:
        SparsityError: even the smallest share tried goes beyond it.
    """
    low, high, best = 0, _STEPS, None
    while high - low > 1:
        middle = (low + high) // 2
        measured = measure(middle / _STEPS)
        if gap(measured) <= bound:
            low, best = middle, measured
        else:
            high, least = middle, measured
    if best is None:
        raise SparsityError(
            f"--max-ppl-gap {bound:g} is out of reach: {least.setting.name}, which turns off "
            f"{1 / _STEPS:.1%} of the active neurons, costs {gap(least):.4%} already",
            "allow more, or run more text with --tokens",
        )
    return best


def _open_sparse(model: str) -> Opened:
    opened = open_any(model)
    if not has_one_gate(opened.checkpoint):
        refuse_fatrelu(opened.checkpoint)
    if opened.own.activation not in ("relu", "fatrelu"):
        origin = opened.checkpoint.origin
        raise SparsityError(
            f"{origin.config_name}: {origin.words.activation} is {opened.own.activation!r}, "
            "a threshold is searched for 'relu' or 'fatrelu'",
            "train with psp sparsify first",
        )
    return opened


def _told(measured: Measurement, base: Measurement) -> str:
    return (
        f"{measured.setting.name}: sparsity {measured.mean_sparsity:.2%}, perplexity "
        f"{measured.ppl:.4f} ({measured.gap(base):+.3%})"
    )
