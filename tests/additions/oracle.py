"""The layer written straight from its equations, and what compares it with `fused_lstm.LSTM`.

A loop of plain PyTorch over steps, layers and directions. At each step it takes the rows of the
sequences that are still running and leaves the others out, so that nothing of a padded step can
reach a result or a gradient. The gradients are autograd's.

T time, B batch, I input, H hidden, P features of h, L layers, D directions, N packed rows.
"""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

from ..budget import assert_within_budget
from ..dropin.helpers import leaf, values

T, B, I, H, P = 6, 4, 3, 5, 2  # noqa: E741  (the field's name for the input size)

# Layers that a regularizer is tested on.
OPTIONS = {
    "plain": {},
    "two-layers": {"num_layers": 2, "bias": False, "batch_first": True},
    "bidirectional": {"bidirectional": True},
    "projected": {"proj_size": P},
    "everything": {"num_layers": 3, "bidirectional": True, "proj_size": P, "batch_first": True},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)

# What `assert_close` gets: a few dozen roundings in float64, torch's own defaults in float32.
CLOSE = {torch.float64: {"rtol": 1e-10, "atol": 1e-12}, torch.float32: {}}


def recurrence_oracle(
    gates,
    weight_hh,
    h0,
    c0,
    *,
    weight_hr=None,
    lengths=None,
    resets=None,
    recurrent_mask=None,
    zoneout_h=None,
    zoneout_c=None,
    cell_clip=None,
    reverse=False,
    project=None,
):
    """One direction of one layer.

    Args:
        gates: [T, B, 4H], or with `project` whatever that takes.
        weight_hh: [4H, P].
        h0: [B, P].
        c0: [B, H].
        weight_hr: [P, H] or None.
        lengths: list of B ints, or None.
        resets: bool [T, B], or None.
        recurrent_mask: [B, P], or None.
        zoneout_h: [T, B, P] or what broadcasts to it, or None.
        zoneout_c: [T, B, H] or what broadcasts to it, or None.
        cell_clip: float or None.
        reverse: whether time runs backwards.
        project: maps the rows of `gates` that are computed to their gates.

    Returns:
        h [T, B, P], c [T, B, H], h_n [B, P] and c_n [B, H].
    """
    steps, batch = gates.shape[:2]
    lengths = [steps] * batch if lengths is None else [int(n) for n in lengths]
    if zoneout_h is not None:
        zoneout_h = torch.as_tensor(zoneout_h, dtype=h0.dtype).expand(steps, *h0.shape)
    if zoneout_c is not None:
        zoneout_c = torch.as_tensor(zoneout_c, dtype=c0.dtype).expand(steps, *c0.shape)
    h, c = h0, c0
    hs, cs = [None] * steps, [None] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        rows = torch.tensor([b for b in range(batch) if t < lengths[b]], dtype=torch.int64)
        hs[t], cs[t] = torch.zeros_like(h0), torch.zeros_like(c0)
        if not len(rows):
            continue
        hp, cp = h[rows], c[rows]
        if resets is not None:
            begins = resets[t][rows].unsqueeze(-1)
            hp = torch.where(begins, torch.zeros_like(hp), hp)
            cp = torch.where(begins, torch.zeros_like(cp), cp)
        a = gates[t][rows]
        if project is not None:
            a = project(a)
        a = a + (hp if recurrent_mask is None else hp * recurrent_mask[rows]) @ weight_hh.t()
        i, f, g, o = a.chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c_new = f * cp + i * g
        if cell_clip is not None:
            c_new = c_new.clamp(-cell_clip, cell_clip)
        h_new = o * c_new.tanh()
        if weight_hr is not None:
            h_new = h_new @ weight_hr.t()
        if zoneout_c is not None:
            z = zoneout_c[t][rows]
            c_new = z * cp + (1 - z) * c_new
        if zoneout_h is not None:
            z = zoneout_h[t][rows]
            h_new = z * hp + (1 - z) * h_new
        h, c = h.index_copy(0, rows, h_new), c.index_copy(0, rows, c_new)
        hs[t] = hs[t].index_copy(0, rows, h_new)
        cs[t] = cs[t].index_copy(0, rows, c_new)
    return torch.stack(hs), torch.stack(cs), h, c


def lstm_oracle(
    weights,
    x,
    h0,
    c0,
    *,
    num_layers=1,
    bidirectional=False,
    lengths=None,
    resets=None,
    recurrent_masks=None,
    weight_masks=None,
    zoneout_h=None,
    zoneout_c=None,
    cell_clip=None,
):
    """The stack of layers.

    Args:
        weights: tensors by name, as in the `state_dict`.
        x: [T, B, I].
        h0: [L·D, B, P].
        c0: [L·D, B, H].
        num_layers: L.
        bidirectional: whether D is 2.
        lengths: list of B ints, or None.
        resets: bool [T, B], or None.
        recurrent_masks: L·D tensors [B, P], or None.
        weight_masks: L·D tensors [4H, P] that multiply weight_hh, or None.
        zoneout_h: L·D times what `recurrence_oracle` takes, or None.
        zoneout_c: likewise.
        cell_clip: float or None.

    Returns:
        output [T, B, D·P], h_n [L·D, B, P], c_n [L·D, B, H] and the last layer's cells [T, B, D·H].
    """
    directions = 2 if bidirectional else 1
    h_n, c_n = [], []
    for layer in range(num_layers):
        outputs, cells = [], []
        for direction in range(directions):
            k = layer * directions + direction
            suffix = f"_l{layer}" + ("_reverse" if direction else "")
            weight_ih, weight_hh = weights["weight_ih" + suffix], weights["weight_hh" + suffix]
            biases = [weights.get(name + suffix) for name in ("bias_ih", "bias_hh")]

            def project(rows, weight=weight_ih, biases=biases):
                return sum((b for b in biases if b is not None), rows @ weight.t())

            h, c, h_last, c_last = recurrence_oracle(
                x,
                weight_hh if weight_masks is None else weight_hh * weight_masks[k],
                h0[k],
                c0[k],
                weight_hr=weights.get("weight_hr" + suffix),
                lengths=lengths,
                resets=resets,
                recurrent_mask=None if recurrent_masks is None else recurrent_masks[k],
                zoneout_h=None if zoneout_h is None else zoneout_h[k],
                zoneout_c=None if zoneout_c is None else zoneout_c[k],
                cell_clip=cell_clip,
                reverse=direction == 1,
                project=project,
            )
            outputs.append(h)
            cells.append(c)
            h_n.append(h_last)
            c_n.append(c_last)
        x = torch.cat(outputs, -1)
    return x, torch.stack(h_n), torch.stack(c_n), torch.cat(cells, -1)


# Packed rows and padded batches


def to_padded(rows, batch_sizes, fill=0):
    """[N, ...] rows to [T, B, ...], in the order of the rows."""
    sizes = batch_sizes.tolist()
    padded = rows.new_full((len(sizes), sizes[0], *rows.shape[1:]), fill)
    where = torch.arange(sizes[0]) < batch_sizes[:, None]
    return padded.masked_scatter(where.reshape(*where.shape, *[1] * (rows.dim() - 1)), rows)


def to_rows(padded, batch_sizes):
    """[T, B, ...] to [N, ...] rows."""
    return torch.cat([step[:size] for step, size in zip(padded, batch_sizes.tolist(), strict=True)])


def lengths_of(batch_sizes):
    """The lengths in a packed batch, in the order of its rows."""
    return [int((batch_sizes > b).sum()) for b in range(int(batch_sizes[0]))]


def pack(x, lengths, batch_first=False):
    return torch.nn.utils.rnn.pack_padded_sequence(
        x, torch.as_tensor(lengths), batch_first=batch_first, enforce_sorted=False
    )


# Running a layer, and its oracle in the same form


def build(*args, seed=0, **options):
    """`fused_lstm.LSTM` with weights of some size: those at initialisation hardly recur."""
    import fused_lstm

    options = {"dtype": torch.float64, **options}
    module = fused_lstm.LSTM(*(args or (I, H)), **options)
    with torch.no_grad():
        for k, parameter in enumerate(module.parameters()):
            parameter.copy_(0.7 * values(*parameter.shape, seed=100 * seed + k))
    return module


def make_x(*, seed=1, steps=T, batch=B, size=I, batch_first=False, dtype=torch.float64):
    """[T, B, I], [B, T, I] with batch_first, [T, I] for a batch of None."""
    if batch is None:
        return values(steps, size, seed=seed, dtype=dtype)
    x = values(steps, batch, size, seed=seed, dtype=dtype)
    return x.transpose(0, 1).contiguous() if batch_first else x


def make_hx(module, batch=B, dtype=torch.float64, seed=2):
    rows = module.num_layers * (2 if module.bidirectional else 1)
    between = () if batch is None else (batch,)
    h0 = values(rows, *between, module.proj_size or module.hidden_size, seed=seed, dtype=dtype)
    c0 = values(rows, *between, module.hidden_size, seed=seed + 1, dtype=dtype)
    return h0, c0


def make_resets(*shape, seed=5, probability=0.35):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator) < probability


def data_of(x):
    return x.data if isinstance(x, PackedSequence) else x


def with_data(x, data):
    return PackedSequence(data, *x[1:]) if isinstance(x, PackedSequence) else data


def cotangent(result, seed):
    """Values that no dtype rounds, so that a loss is the same in all of them."""
    return values(*result.shape, seed=seed).bfloat16().to(result.dtype)


def loss_of(results, loss_on=None):
    """A sum whose gradient differs from element to element, the same for every implementation."""
    chosen = [name for name in results if loss_on is None or name in loss_on]
    seeds = {"output": 40, "h_n": 41, "c_n": 42, "cells": 43}
    return sum((results[name] * cotangent(results[name], seeds[name])).sum() for name in chosen)


def finish(results, x, hx, weights, loss_on):
    """Differentiate, and list results and gradients by name."""
    loss = loss_of(results, loss_on)
    if loss.requires_grad:  # an oracle's may not, of sequences without a single step
        loss.backward()
    results = {name: tensor.detach() for name, tensor in results.items()}
    results["grad of input"] = x.grad
    if hx is not None:
        results["grad of h0"], results["grad of c0"] = hx[0].grad, hx[1].grad
    for name, weight in weights.items():
        results[f"grad of {name}"] = weight.grad
    return results


def run(module, x, hx=None, *, seed=None, loss_on=None, **arguments):
    """Results of `module` and every gradient, by name; `arguments` go to its forward."""
    data = leaf(data_of(x))
    if hx is not None:
        hx = tuple(leaf(state) for state in hx)
    module.zero_grad(set_to_none=True)
    if seed is not None:
        torch.manual_seed(seed)
    returned = module(with_data(x, data), hx, **arguments)
    output, states = returned[:2]
    assert isinstance(output, PackedSequence) == isinstance(x, PackedSequence)
    results = {"output": data_of(output), "h_n": states[0], "c_n": states[1]}
    if arguments.get("return_cells"):
        cells = returned[2]
        assert isinstance(cells, PackedSequence) == isinstance(x, PackedSequence)
        if isinstance(x, PackedSequence):
            for ours, theirs in zip((*output[1:], *cells[1:]), (*x[1:], *x[1:]), strict=True):
                assert ours is theirs or torch.equal(ours, theirs)
        results["cells"] = data_of(cells)
    else:
        assert len(returned) == 2
    return finish(results, data, hx, dict(module.named_parameters()), loss_on)


def run_oracle(
    module,
    x,
    hx=None,
    *,
    dtype=torch.float64,
    lengths=None,
    resets=None,
    return_cells=False,
    loss_on=None,
    **modifiers,
):
    """What `run` is to return, by `lstm_oracle`; `modifiers` go there."""
    weights = {name: leaf(p.detach().to(dtype)) for name, p in module.named_parameters()}
    data = leaf(data_of(x).to(dtype))
    if hx is not None:
        hx = tuple(leaf(state.to(dtype)) for state in hx)
    packed = isinstance(x, PackedSequence)
    unbatched = not packed and x.dim() == 2
    swapped = module.batch_first and not (packed or unbatched)

    def leading(tensor):
        """To [T, B, ...], in the order of the rows if packed."""
        if unbatched:
            return tensor.unsqueeze(1)
        return tensor.transpose(0, 1) if swapped else tensor

    def back(tensor):
        if packed:
            return to_rows(tensor, x.batch_sizes)
        if unbatched:
            return tensor.squeeze(1)
        return tensor.transpose(0, 1) if swapped else tensor

    padded = to_padded(data, x.batch_sizes) if packed else leading(data)
    states = hx
    if hx is None:
        states = make_hx(module, padded.shape[1], dtype=dtype)
        states = tuple(torch.zeros_like(state) for state in states)
    elif unbatched:
        states = tuple(state.unsqueeze(1) for state in hx)
    if packed:
        lengths = lengths_of(x.batch_sizes)
        if isinstance(resets, PackedSequence):
            resets = to_padded(resets.data, x.batch_sizes, False)
        elif resets is not None:
            resets = resets.transpose(0, 1) if module.batch_first else resets
            if x.sorted_indices is not None:
                resets = resets[:, x.sorted_indices]
        if x.sorted_indices is not None:
            states = tuple(state[:, x.sorted_indices] for state in states)
    else:
        if lengths is not None:
            lengths = torch.as_tensor(lengths).reshape(-1).tolist()
        if resets is not None:
            resets = leading(resets)
    output, h_n, c_n, cells = lstm_oracle(
        weights,
        padded,
        *states,
        num_layers=module.num_layers,
        bidirectional=module.bidirectional,
        lengths=lengths,
        resets=resets,
        **modifiers,
    )
    if packed and x.unsorted_indices is not None:
        h_n, c_n = h_n[:, x.unsorted_indices], c_n[:, x.unsorted_indices]
    if unbatched:
        h_n, c_n = h_n.squeeze(1), c_n.squeeze(1)
    results = {"output": back(output), "h_n": h_n, "c_n": c_n}
    if return_cells:
        results["cells"] = back(cells)
    return finish(results, data, hx, weights, loss_on)


def assert_same(actual, expected, **tolerance):
    """Compares two dictionaries of `run`: dtype, shape and values; a gradient of None is zero."""
    assert list(actual) == list(expected)
    for name, wanted in expected.items():
        got = actual[name]
        if wanted is None or got is None:
            for tensor in (got, wanted):
                assert tensor is None or not tensor.any(), name
            continue
        options = tolerance or CLOSE.get(got.dtype, {})
        assert got.shape == wanted.shape, f"{name}: {list(got.shape)}, not {list(wanted.shape)}"
        torch.testing.assert_close(
            got, wanted.to(got.dtype), **options, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_results_within_budget(actual, native, reference64):
    """Compares dictionaries of `run` by error: ours against the oracle's in the same dtype."""
    assert list(actual) == list(native) == list(reference64)
    for name, wanted in reference64.items():
        assert actual[name].dtype == native[name].dtype, name
        assert_within_budget(actual[name], native[name], wanted, name)


def compare(module, x, hx=None, *, modifiers=None, seed=None, **arguments):
    """`module` against the oracle: results and every gradient."""
    expected = run_oracle(module, x, hx, **arguments, **(modifiers or {}))
    actual = run(module, x, hx, seed=seed, **arguments)
    assert actual["grad of input"] is not None
    for name in ("output", "h_n", "c_n", "cells"):
        if name in actual:
            assert actual[name].dtype == data_of(x).dtype, name
    assert_same(actual, expected)
    return actual


def zoneout_in_evaluation(module, p):
    """The oracle's arguments for `zoneout=p` in evaluation."""
    p_h, p_c = p if isinstance(p, tuple) else (p, p)
    count = module.num_layers * (2 if module.bidirectional else 1)
    return {"zoneout_h": [p_h] * count, "zoneout_c": [p_c] * count}


def masks_from_gradients(module, x, hx, seed, **arguments):
    """What the recurrent and the weight dropout of a training step drop, as its gradients tell.

    A state h_0 that the mask drops has no gradient, and neither has a weight that is dropped.
    Which ones these are depends on the seed and the shapes alone.

    Returns:
        The masks of h, [L·D, B, P], and of the weights, L·D times [4H, P]; without the scale.
    """
    results = run(module, x, hx, seed=seed, **arguments)
    weights = [g for name, g in results.items() if name.startswith("grad of weight_hh")]
    return results["grad of h0"] != 0, [grad != 0 for grad in weights]
