"""How far a result may be from the truth: no further than twice what PyTorch's own is."""

import torch


def assert_within_budget(
    actual: torch.Tensor, native: torch.Tensor, reference64: torch.Tensor, name: str = "result"
) -> None:
    """Asserts max|actual - reference64| <= 2 max|native - reference64| + a rounding of the result.

    Args:
        actual: the tensor under test.
        native: the same quantity by plain PyTorch in the same dtype.
        reference64: the same quantity in float64, from the same inputs.
        name: what to call it in the message.
    """
    assert actual.shape == reference64.shape, f"{name}: {actual.shape}, not {reference64.shape}"
    actual, native = actual.detach().cpu(), native.detach().cpu()
    reference64 = reference64.detach().cpu()
    if actual.numel() == 0:
        return
    error = (actual.double() - reference64).abs().max().item()
    # Where the native result happens to be exact, the last rounding alone may still differ.
    budget = 2 * (native.double() - reference64).abs().max().item()
    budget += torch.finfo(actual.dtype).eps * reference64.abs().max().item()
    # Written so that a NaN fails.
    assert error <= budget, f"{name}: error {error:.3g} above its budget of {budget:.3g}"
