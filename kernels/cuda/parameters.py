"""The structures of parameters.h, for ctypes: the same bytes."""

import ctypes

__all__ = ["MAX_RECURRENCES", "BackwardParameters", "ForwardParameters"]

MAX_RECURRENCES = 8

_pointer, _stride, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class Modifiers(ctypes.Structure):
    """What modifies one recurrence."""

    _fields_ = [
        ("lengths", _pointer),
        ("step_rows", _pointer),
        ("resets", _pointer),
        ("recurrent_mask", _pointer),
        ("zoneout_h", _pointer),
        ("zoneout_c", _pointer),
        ("resets_stride_t", _stride),
        ("resets_stride_b", _stride),
        ("zoneout_h_stride_t", _stride),
        ("zoneout_h_stride_b", _stride),
        ("zoneout_c_stride_t", _stride),
        ("zoneout_c_stride_b", _stride),
        ("zoneout_h_is_float", _int),
        ("zoneout_c_is_float", _int),
        ("cell_clip", ctypes.c_float),
        ("reserved", _int),
    ]


class ForwardRecurrence(ctypes.Structure):
    """One recurrence to compute."""

    _fields_ = [
        ("gates", _pointer),
        ("weight_hh", _pointer),
        ("h0", _pointer),
        ("c0", _pointer),
        ("h", _pointer),
        ("c", _pointer),
        ("activations", _pointer),
        ("h_n", _pointer),
        ("c_n", _pointer),
        ("gates_stride_t", _stride),
        ("gates_stride_b", _stride),
        ("modifiers", Modifiers),
        ("steps", _int),
        ("reverse", _int),
        ("wide_states", _int),
        ("reserved", _int),
    ]


class BackwardRecurrence(ctypes.Structure):
    """One recurrence to differentiate."""

    _fields_ = [
        ("grad_h", _pointer),
        ("grad_c", _pointer),
        ("grad_h_n", _pointer),
        ("grad_c_n", _pointer),
        ("activations", _pointer),
        ("c", _pointer),
        ("weight_hh", _pointer),
        ("c0", _pointer),
        ("grad_gates", _pointer),
        ("grad_h0", _pointer),
        ("grad_c0", _pointer),
        ("grad_h_stride_t", _stride),
        ("grad_h_stride_b", _stride),
        ("grad_c_stride_t", _stride),
        ("grad_c_stride_b", _stride),
        ("modifiers", Modifiers),
        ("steps", _int),
        ("reverse", _int),
        ("wide_states", _int),
        ("reserved", _int),
    ]


def _parameters(recurrence: type[ctypes.Structure]) -> list[tuple[str, type]]:
    return [
        ("recurrence", recurrence * MAX_RECURRENCES),
        ("recurrences", _int),
        ("tiles", _int),
        ("first_tile", _int),
        ("batch", _int),
        ("exchange", _pointer),
        ("flags", _pointer),
    ]


class ForwardParameters(ctypes.Structure):
    """A launch of the forward kernel."""

    _fields_ = _parameters(ForwardRecurrence)


class BackwardParameters(ctypes.Structure):
    """A launch of the backward kernel."""

    _fields_ = _parameters(BackwardRecurrence)
