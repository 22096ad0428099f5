"""A pretended GPU: tensors that say they are on a device, held and computed on the CPU.

The device is `meta`, the one that every build of torch knows besides the CPU. Within
`PretendedDevice` everything that is made with `device="meta"` is there, no operation may mix
it with tensors of the CPU, and what the program would wait for is written down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
_WAITING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::_linalg_check_errors",
    "aten::_unique2",
}
"""What asks the device for a number, or for the size of what it makes."""


class OnDevice(torch.Tensor):
    """A tensor that says it is on a GPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"OnDevice({self.held!r})"

    def tolist(self) -> Any:
        """Go by the CPU, which torch's own does without telling."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, *rest: Any) -> Any:
        raise AssertionError(f"{func} outside of the pretended device")


class PretendedDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes on the CPU what is on the device, and writes down waits and copies.

    Attributes:
        waits: operations that would wait for the device, by name.
        sent: copies to the device.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: Counter[str] = Counter()
        self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        tensors = list(_tensors((args, kwargs)))
        there = [each for each in tensors if isinstance(each, OnDevice)]
        kwargs.pop("pin_memory", None)
        target = kwargs.get("device")
        if name == "aten::_pin_memory":
            return args[0]
        if name == "aten::record_stream":
            return None
        if name in ("aten::_to_copy", "aten::copy_"):
            return self._copy(func, name, args, kwargs, target)
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        here = [each for each in tensors if not isinstance(each, OnDevice) and each.dim()]
        assert not (there and here), f"{func} mixes devices: {[each.shape for each in here]}"
        if there and (name in _WAITING or _by_mask(name, args)):
            self.waits[name] += 1
        if name == "aten::repeat_interleave" and there and kwargs.get("output_size") is None:
            self.waits[name] += 1
        made = func(*_held(args), **_held(kwargs))
        goes = bool(there) if target is None else torch.device(target).type == "meta"
        return _placed(made, there) if goes else made

    def _copy(self, func: Any, name: str, args: Any, kwargs: Any, target: Any) -> Any:
        source = args[0] if name == "aten::_to_copy" else args[1]
        on_device = isinstance(source, OnDevice)
        if name == "aten::copy_":
            goes = isinstance(args[0], OnDevice)
        else:
            goes = on_device if target is None else torch.device(target).type == "meta"
            kwargs = kwargs | {"device": torch.device("cpu")} if target is not None else kwargs
        if on_device and not goes:
            self.waits[name] += 1
        self.sent += goes and not on_device
        made = func(*_held(args), **_held(kwargs))
        if name == "aten::copy_":
            return args[0]
        return OnDevice(made) if goes else made


def _by_mask(name: str, args: Any) -> bool:
    """Whether places are named by true entries, which have to be counted."""
    if not name.startswith(("aten::index", "aten::_index_put_impl_")) or len(args) < 2:
        return False
    indices = args[1] if isinstance(args[1], list | tuple) else []
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """Yield what an operation takes; torch's own walk knows more than lists, and takes its time."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, list | tuple | dict):
        for each in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(each)


def _mapped(change: Callable[[torch.Tensor], torch.Tensor], tree: Any) -> Any:
    """Return what an operation takes or gives with every tensor changed."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {name: _mapped(change, each) for name, each in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(change, each) for each in tree)
    return tree


def _held(tree: Any) -> Any:
    return _mapped(values, tree)


def _placed(made: Any, there: list[OnDevice]) -> Any:
    """Return what was made as on the device; what was changed in place is what it was."""
    known = {id(each.held): each for each in there}

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        return known[id(tensor)] if id(tensor) in known else OnDevice(tensor)

    return _mapped(placed, made)


def on_device(tensor: torch.Tensor) -> OnDevice:
    """Return a tensor as on the device, whose memory it shares."""
    return OnDevice(tensor)


def values(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's values, wherever it is."""
    return tensor.held if isinstance(tensor, OnDevice) else tensor
