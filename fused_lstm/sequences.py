"""What users say of their sequences, `lengths` and `resets`, as the recurrence wants it.

Dimensions: `T` time steps, `B` batch, `N` rows of a packed batch.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fused_lstm.devices import upload
from fused_lstm.reference import packed_positions

__all__ = ["Lengths", "as_lengths", "as_packed_resets", "as_resets"]

# How users may give lengths.
Lengths = Tensor | Sequence[int] | int

_INTEGERS = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
)


def as_lengths(lengths: Lengths, batch: int, steps: int, batched: bool, like: Tensor) -> Tensor:
    """Lengths as the recurrence wants them: [B] int64 on a device.

    Args:
        lengths: a tensor of integers on any device, a list or tuple of them; without a batch one
            integer, or a tensor or list of one.
        batch: B.
        steps: T.
        batched: whether the input has a dimension for the batch.
        like: a tensor on the device they are wanted on.

    Raises:
        TypeError: for anything but integers.
        ValueError: for another count than B, or a length in a list that is not between 0 and T.
            (The values of a tensor are looked at where the recurrence runs.)
    """
    if not isinstance(lengths, Tensor):
        lengths = _from_list(lengths, steps)
    if lengths.dtype not in _INTEGERS:
        raise TypeError(f"lengths: expected integers, got {lengths.dtype}")
    if not batched and lengths.dim() == 0:
        lengths = lengths.unsqueeze(0)
    if tuple(lengths.shape) != (batch,):
        expected = f"[{batch}], one for each sequence" if batched else "[1], or no dimension"
        raise ValueError(f"lengths: expected shape {expected}, got {list(lengths.shape)}")
    return _moved(lengths.to(torch.int64), like.device)


def _from_list(lengths: Sequence[int] | int, steps: int) -> Tensor:
    """Integers as a tensor, or raise what `as_lengths` says."""
    # Of NumPy's numbers and arrays only the latter have dimensions.
    several = isinstance(lengths, Sequence) or getattr(lengths, "ndim", 0) > 0
    integers = []
    for value in lengths if several else (lengths,):  # type: ignore[union-attr]
        try:
            if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:
                raise TypeError
            integers.append(operator.index(value))  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(
                "lengths: expected a tensor or list of integers, got "
                f"{value!r} of type {type(value).__name__}"
            ) from None
    for length in integers:
        # As numbers: a recording may hold a tensor's values back.
        if not 0 <= length <= steps:
            raise ValueError(f"lengths: expected 0 <= length <= {steps} (time steps), got {length}")
    result = torch.tensor(integers, dtype=torch.int64)
    return result if several else result[0]


def as_resets(resets: Tensor, leading: tuple[int, ...], batch_first: bool, like: Tensor) -> Tensor:
    """Resets as the recurrence wants them: [T, B] bool on a device, any strides.

    Args:
        resets: shaped `leading`.
        leading: shape of the input without its features: (T, B), (B, T) with batch_first, or (T,).
        batch_first: whether time is the second dimension.
        like: a tensor on the device they are wanted on.

    Raises:
        TypeError: if it is not a tensor of bools.
        ValueError: for another shape.
    """
    _check_bools(resets)
    if tuple(resets.shape) != leading:
        names = "[T]" if len(leading) == 1 else "[B, T]" if batch_first else "[T, B]"
        raise ValueError(
            f"resets: expected shape {list(leading)} ({names}), got {list(resets.shape)}"
        )
    resets = _moved(resets, like.device)
    if len(leading) == 1:
        return resets.unsqueeze(1)
    return resets.t() if batch_first else resets


def as_packed_resets(
    resets: Tensor | PackedSequence, input: PackedSequence, batch_first: bool
) -> Tensor:
    """Resets of packed rows: [N] bool on the device of the rows.

    Args:
        resets: packed as the input is, without features; or [T, B], [B, T] with batch_first, in
            the order of the user's batch.
        input: the layer's input.
        batch_first: how padded resets are laid out.

    Raises:
        TypeError: if they are not bools.
        ValueError: if they are packed in another way, or shaped otherwise.
    """
    rows, batch_sizes, order, _ = input
    steps, batch = batch_sizes.shape[0], int(batch_sizes[0])
    if isinstance(resets, PackedSequence):
        _check_bools(resets.data)
        if (
            not torch.equal(resets.batch_sizes, batch_sizes)
            or not torch.equal(_order(resets), _order(input))
            or tuple(resets.data.shape) != (rows.shape[0],)
        ):
            raise ValueError(
                "resets: expected a PackedSequence of one bool for each row of the input, packed "
                f"as the input is ({rows.shape[0]} rows, batch_sizes {batch_sizes.tolist()}, order "
                f"{_order(input).tolist()}), got data {list(resets.data.shape)}, batch_sizes "
                f"{resets.batch_sizes.tolist()}, order {_order(resets).tolist()}"
            )
        return _moved(resets.data, rows.device)
    leading = (batch, steps) if batch_first else (steps, batch)
    padded = as_resets(resets, leading, batch_first, rows)
    step, column = (
        _moved(index, rows.device) for index in packed_positions(batch_sizes, rows.shape[0])
    )
    return padded[step, column if order is None else order[column]]


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, without waiting for a GPU where nobody can tell.

    Pageable memory is read before the call returns. Pinned memory is read later, when its owner may
    have refilled it, and what comes from a GPU arrives later.
    """
    if tensor.device == device:
        return tensor
    pageable = tensor.device.type == "cpu" and not tensor.is_pinned()
    return upload(tensor, device) if pageable else tensor.to(device)


def _order(sequence: PackedSequence) -> Tensor:
    """Which of the user's sequences each column is, on the CPU."""
    if sequence.sorted_indices is None:
        return torch.arange(int(sequence.batch_sizes[0]))
    return sequence.sorted_indices.cpu()


def _check_bools(resets: Tensor) -> None:
    if not isinstance(resets, Tensor):
        raise TypeError(f"resets: expected a tensor of bools, got {type(resets).__name__}")
    if resets.dtype != torch.bool:
        raise TypeError(f"resets: expected a tensor of torch.bool, got {resets.dtype}")
