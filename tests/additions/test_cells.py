"""`return_cells`: the cell states of the last layer at every step."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from .oracle import (
    CLOSE,
    B,
    H,
    P,
    T,
    assert_same,
    build,
    compare,
    make_hx,
    make_resets,
    make_x,
    pack,
    run,
)

pytestmark = pytest.mark.usefixtures("backend")

OPTIONS = {
    "plain": {},
    "two-layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "projected": {"proj_size": P},
    "batch-first": {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
    "everything": {"num_layers": 3, "bidirectional": True, "proj_size": P, "batch_first": True},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def input_of(form, module, dtype=torch.float64):
    if form == "unbatched":
        return make_x(batch=None, dtype=dtype)
    if form == "batched":
        return make_x(batch_first=module.batch_first, dtype=dtype)
    return pack(make_x(dtype=dtype), [6, 4, 4, 1] if form == "packed" else [2, 6, 1, 4])


FORMS = ["batched", "unbatched", "packed", "packed-unsorted"]


@options
@pytest.mark.parametrize(
    ("form", "with_hx"), [*((form, True) for form in FORMS), ("packed-unsorted", False)]
)
def test_values_and_gradients(options, form, with_hx):
    module = build(**options)
    x = input_of(form, module)
    hx = make_hx(module, None if form == "unbatched" else B) if with_hx else None
    results = compare(module, x, hx, return_cells=True)
    directions = 2 if module.bidirectional else 1
    features = x.data.shape if isinstance(x, PackedSequence) else x.shape
    assert results["cells"].shape == (*features[:-1], directions * H)


@options
@pytest.mark.parametrize("used", [("cells",), ("cells", "c_n"), ("output",), ("h_n", "c_n")])
def test_gradients_of_some_of_the_results(options, used):
    module = build(**options)
    compare(module, input_of("batched", module), make_hx(module), return_cells=True, loss_on=used)


@options
@pytest.mark.parametrize("form", ["batched", "packed-unsorted"])
def test_the_other_results_stay(options, form):
    module = build(**options, dtype=torch.float32)
    x = input_of(form, module, torch.float32)
    hx = make_hx(module, None if form == "unbatched" else B, dtype=torch.float32)
    plain = run(module, x, hx)
    results = run(module, x, hx, return_cells=True, loss_on=("output", "h_n", "c_n"))
    del results["cells"]
    assert_same(results, plain)
    native = nn.LSTM(module.input_size, H, **options)
    native.load_state_dict(module.state_dict())
    assert_same(results, run(native, x, hx))


@options
def test_the_last_cell_of_each_direction_is_the_state(options):
    module = build(**options, dtype=torch.float32)
    x = make_x(batch_first=module.batch_first, dtype=torch.float32)
    output, (_, c_n), cells = module(x, return_cells=True)
    if module.batch_first:
        output, cells = output.transpose(0, 1), cells.transpose(0, 1)
    assert cells.dtype == output.dtype == torch.float32
    directions = 2 if module.bidirectional else 1
    torch.testing.assert_close(cells[-1, :, :H], c_n[-directions])
    if directions == 2:
        torch.testing.assert_close(cells[0, :, H:], c_n[-1])


def test_packed_cells_can_be_padded():
    module = build(bidirectional=True)
    lengths = [2, 6, 1, 4]
    _, _, cells = module(pack(make_x(), lengths), return_cells=True)
    padded, found = pad_packed_sequence(cells, total_length=T)
    assert found.tolist() == lengths
    _, _, expected = module(make_x(), lengths=lengths, return_cells=True)
    torch.testing.assert_close(padded, expected, **CLOSE[torch.float64])


def test_with_lengths_and_resets():
    module = build(num_layers=2, proj_size=P, batch_first=True)
    compare(
        module,
        make_x(batch_first=True),
        make_hx(module),
        lengths=[2, 6, 0, 4],
        resets=make_resets(B, T),
        return_cells=True,
        loss_on=("cells",),
    )


@pytest.mark.parametrize("form", FORMS)
def test_without_gradients(form):
    module = build(num_layers=2, bidirectional=True)
    x = input_of(form, module)
    expected = run(module, x, return_cells=True)["cells"]
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            cells = module(x, return_cells=True)[2]
        torch.testing.assert_close(
            cells.data if isinstance(cells, PackedSequence) else cells,
            expected,
            **CLOSE[torch.float64],
        )


def test_false_returns_two_values():
    module = build()
    assert len(module(make_x(), return_cells=False)) == 2
    assert len(module(pack(make_x(), [2, 6, 1, 4]), return_cells=False)) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_of_the_cells_is_that_of_the_output(dtype):
    module = build(bidirectional=True, dtype=dtype)
    output, (_, c_n), cells = module(make_x(dtype=dtype), return_cells=True)
    assert cells.dtype == output.dtype == dtype
    exact = module.double()(make_x(dtype=dtype).double(), return_cells=True)[2]
    torch.testing.assert_close(cells.double(), exact, rtol=0.02, atol=0.02)
    assert torch.equal(cells[-1, :, :H], c_n[0])
