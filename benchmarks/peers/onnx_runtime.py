"""ONNX Runtime's LSTM on a CPU: a graph of one LSTM operator a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.peers.peer import Peer
from fused_lstm.bench.cases import Case, Data
from fused_lstm.bench.providers import Prepared

# Old enough for every runtime in use. From 18 on, Split has to be told how many parts to make.
_OPSET = 13
_IR_VERSION = 8


class ONNXRuntime(Peer):
    """An inference session of ONNX Runtime: all its optimisations, as many threads as torch."""

    title = "ONNX Runtime"
    packages = ("onnx", "onnxruntime")
    device_type = "cpu"
    own_threads = True
    dtypes = ("float32", "float16")
    why_dtypes = "has no LSTM for this on a CPU"
    modes = ("inference",)
    lacks: ClassVar[Mapping[str, str]] = {
        "proj_size": "has an LSTM without a projection",
        "packed": "takes padded sequences alone, and padding would be timed with it",
    }

    def _build(
        self, case: Case, parameters: dict[str, Tensor], device: torch.device, mode: str
    ) -> Prepared:
        self._import("onnx")
        runtime = self._import("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        # Its threads wait for the next operator busily, as they should, but not after a call:
        # whoever is timed in the next turn would lack a core.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = runtime.InferenceSession(
            build_model(case, parameters), options, providers=["CPUExecutionProvider"]
        )
        shape = case.shape
        names = [each.name for each in session.get_inputs()]

        def call(data: Data) -> tuple[Tensor, ...]:
            inputs: tuple[Tensor, ...] = data.inputs
            if shape.cell:
                inputs = tuple(each.unsqueeze(0) for each in inputs)
            # Neither arrays of tensors nor tensors of arrays are copies.
            arrays = [each.detach().numpy() for each in inputs]
            results = session.run(None, dict(zip(names, arrays, strict=True)))
            output, h_n, c_n = (torch.from_numpy(each) for each in results)
            if shape.cell:
                return h_n[0], c_n[0]
            # From [T, B, D, H], or [T, 1, B, H].
            output = output.view(shape.T, shape.B, -1)
            # As torch does it, a view.
            return (output.transpose(0, 1) if shape.batch_first else output), h_n, c_n

        # The runtime puts casts around an LSTM of float16.
        reason = "computed in float32, between casts" if case.dtype_name == "float16" else ""
        return Prepared(call, f"{self._version()}, CPUExecutionProvider", reason)


def build_model(case: Case, parameters: dict[str, Tensor]) -> bytes:
    """Make the ONNX model of a case's layer.

    Inputs: input as the layer takes it, but of a cell [1, B, I]; h_0 and c_0 [L·D, B, H].
    Outputs: output [T, B, D, H], or [T, 1, B, H] of one direction; h_n and c_n [L·D, B, H].
    """
    from onnx import helper, numpy_helper

    s = case.shape
    D, L = s.directions, s.num_layers
    dtype = helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=case.dtype).numpy().dtype)
    nodes: list[Any] = []
    constants: list[Any] = []

    def add(operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, outputs, **attributes))
        return outputs[0]

    def constant(name: str, value: Tensor) -> str:
        constants.append(numpy_helper.from_array(value.contiguous().numpy(), name))
        return name

    below = "input"
    if s.batch_first:
        below = add("Transpose", [below], ["input_by_steps"], perm=[1, 0, 2])
    given, last = (
        {state: [f"{state}_{layer}" for layer in range(L)] for state in states}
        for states in (("h_0", "c_0"), ("h_n", "c_n"))
    )
    for state, parts in given.items():
        if L > 1:
            add("Split", [state], parts, axis=0)
        else:
            given[state] = [state]
    for state in last:
        if L == 1:
            last[state] = [state]
    for layer in range(L):
        weights = [
            constant(f"{name}_{layer}", value)
            for name, value in zip("WRB", onnx_weights(case, parameters, layer), strict=True)
        ]
        states = [given["h_0"][layer], given["c_0"][layer]]
        is_last = layer == L - 1
        y = "output" if is_last and D == 1 else f"y_{layer}"
        add(
            "LSTM",
            # The empty name is that of the lengths of sequences.
            [below, *weights, "", *states],
            [y, last["h_n"][layer], last["c_n"][layer]],
            hidden_size=s.H,
            direction="bidirectional" if s.bidirectional else "forward",
        )
        if D == 2:
            # From [T, D, B, H].
            name = "output" if is_last else f"by_rows_{layer}"
            y = add("Transpose", [y], [name], perm=[0, 2, 1, 3])
        if not is_last:
            sizes = constant(f"sizes_{layer}", torch.tensor([s.T, s.B, D * s.H]))
            below = add("Reshape", [y, sizes], [f"input_{layer + 1}"])
    for state, parts in last.items():
        if L > 1:
            add("Concat", parts, [state], axis=0)

    leading = [s.B, s.T] if s.batch_first else [s.T, s.B]
    state_sizes = [L * D, s.B, s.H]
    output_sizes = [s.T, s.B, 2, s.H] if D == 2 else [s.T, 1, s.B, s.H]
    graph = helper.make_graph(
        nodes,
        "lstm",
        [
            helper.make_tensor_value_info("input", dtype, [*leading, s.I]),
            helper.make_tensor_value_info("h_0", dtype, state_sizes),
            helper.make_tensor_value_info("c_0", dtype, state_sizes),
        ],
        [
            helper.make_tensor_value_info("output", dtype, output_sizes),
            helper.make_tensor_value_info("h_n", dtype, state_sizes),
            helper.make_tensor_value_info("c_n", dtype, state_sizes),
        ],
        constants,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION
    )
    serialized: bytes = model.SerializeToString()
    return serialized


def onnx_weights(
    case: Case, parameters: dict[str, Tensor], layer: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Arrange a layer's parameters as ONNX's LSTM takes them.

    Returns:
        W [D, 4·H, I], R [D, 4·H, H] and B [D, 8·H], the biases of the input's product before those
        of the recurrent one; gates in the order i, o, f, c.
    """
    suffixes = [""] if case.shape.cell else [f"_l{layer}", f"_l{layer}_reverse"]
    suffixes = suffixes[: case.shape.directions]

    def arrange(name: str) -> Tensor:
        each = [reorder_gates(parameters[name + suffix]) for suffix in suffixes]
        return torch.stack(each)

    biases = torch.cat([arrange("bias_ih"), arrange("bias_hh")], dim=1)
    return arrange("weight_ih"), arrange("weight_hh"), biases


def reorder_gates(parameter: Tensor) -> Tensor:
    """Reorder gates from torch's i, f, g, o to ONNX's i, o, f, c (its c is torch's g)."""
    i, f, g, o = parameter.chunk(4)
    return torch.cat([i, o, f, g])
