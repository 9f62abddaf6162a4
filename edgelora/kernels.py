"""Which nodes of an ONNX file ONNX Runtime's fast CPU kernels take, and why the others miss them.

MatMulNBits falls back to unpacking the whole weight on every call, with no more than a log line, unless B is a constant
uint8 initializer, zero points are absent or constant packed uint8, there is no g_idx, and the block size is one that a
kernel was written for. Source: onnxruntime, contrib_ops/cpu/quantization/matmul_nbits.cc and mlas qnbitgemm.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgelora.errors import FolderError

BLOCK_SIZES = (16, 32, 64, 128, 256)
BITS = (2, 4, 8)
FLOAT_SHARE = 0.01  # of all weights: a float weight that is larger slows the whole model
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")


def look_at_graph(path: Path, exceptions: Mapping[str, int], *, quantized: bool = True) -> dict[str, Any]:
    """Return {"nodes": one row for each product with a weight, "misses": [{"node", "reason"}], "summary": one sentence}.

    exceptions: node name → accuracy level, as the manifest lists them. quantized: False for a fp32 bundle, whose weights
    are meant to be float.
    """
    graph = read_graph(path)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    fed = {value.name for value in graph.input}
    fixed = {name: tensor for name, tensor in constants.items() if name not in fed}
    total = sum(num_elements(tensor) for tensor in fixed.values())
    rows: list[dict[str, Any]] = []
    misses = [{"node": value.name, "reason": "a float16 input of the graph"} for value in graph.input if is_half(value)]
    for node in graph.node:
        row: dict[str, Any] | None = None
        if node.op_type == "MatMulNBits":
            row, reasons = look_at_matmul(node, fixed, exceptions)
        elif node.op_type in PRODUCTS and quantized:
            row, reasons = look_at_float(node, fixed, total)
        elif node.op_type == "GatherBlockQuantized":
            reasons = ["GatherBlockQuantized has no WebAssembly kernel"]
        else:
            continue
        if row is not None:
            rows.append(row)
        misses += [{"node": node.name, "reason": reason} for reason in reasons]
    return {"nodes": rows, "misses": misses, "summary": summary(rows, misses)}


def read_graph(path: Path) -> Any:
    """Return the graph without its external data. Raises FolderError for what is not an ONNX file."""
    import onnx

    try:
        return onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's errors derive from Exception alone
        raise FolderError(f"{path} is not an ONNX file: {error}", hint="export it again with --overwrite") from None


def look_at_matmul(node: Any, fixed: Mapping[str, Any], exceptions: Mapping[str, int]) -> tuple[dict[str, Any], list[str]]:
    """Return the row of a MatMulNBits node and the reasons why it misses a fast kernel."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    inputs = [*node.input, *[""] * (6 - len(node.input))]
    bits, block_size = attributes.get("bits", 4), attributes.get("block_size", 0)
    level = attributes.get("accuracy_level", 0)
    reasons = []
    if data_type(fixed.get(inputs[1])) != "UINT8":
        reasons.append("B is not a constant uint8 tensor")
    if data_type(fixed.get(inputs[2])) != "FLOAT":
        reasons.append("the scales are not a constant float32 tensor")
    if inputs[3] and data_type(fixed.get(inputs[3])) != "UINT8":
        reasons.append(f"zero points are {(data_type(fixed.get(inputs[3])) or 'computed').lower()}, not constant packed uint8")
    if inputs[4]:
        reasons.append("it has a g_idx")
    if block_size not in BLOCK_SIZES:
        reasons.append(f"block size {block_size}; kernels exist for {', '.join(map(str, BLOCK_SIZES))}")
    if bits not in BITS:
        reasons.append(f"{bits} bits; kernels exist for {', '.join(map(str, BITS))}")
    if level != 4 and bits != 4:
        reasons.append(f"accuracy_level {level} with {bits} bits, which have a kernel at level 4 only")
    elif level != 4 and exceptions.get(node.name) != level:
        reasons.append(f"accuracy_level {level}, which the manifest does not name as an exception")
    row = {"node": node.name, "op": "MatMulNBits", "N": attributes.get("N"), "K": attributes.get("K"), "bits": bits}
    return {**row, "block_size": block_size, "accuracy_level": level, "fast": not reasons}, reasons


def look_at_float(node: Any, fixed: Mapping[str, Any], total: int) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the row of a product with a constant float weight, and a reason if that weight is a large one."""
    weights = [fixed[name] for name in node.input[:2] if name in fixed and len(fixed[name].dims) == 2]
    if not weights:
        return None, []
    size = num_elements(weights[0])
    large = size > FLOAT_SHARE * total
    reasons = [f"{node.op_type} with a float weight of {list(weights[0].dims)}"] if large else []
    shape = list(weights[0].dims)
    row = {"node": node.name, "op": node.op_type, "N": shape[1], "K": shape[0], "bits": 32, "block_size": None}
    return {**row, "accuracy_level": None, "fast": not large}, reasons


def summary(rows: list[dict[str, Any]], misses: list[dict[str, str]]) -> str:
    count = sum(row["op"] == "MatMulNBits" for row in rows)
    if not misses:
        return f"all {count} MatMulNBits nodes are on a fast kernel" if count else "no quantized node: every weight is float"
    return f"{len({miss['node'] for miss in misses})} of {len(rows)} nodes miss a fast kernel"


def data_type(tensor: Any) -> str | None:
    import onnx

    return None if tensor is None else str(onnx.TensorProto.DataType.Name(tensor.data_type))


def num_elements(tensor: Any) -> int:
    count = 1
    for size in tensor.dims:
        count *= size
    return count


def is_half(value: Any) -> bool:
    import onnx

    return bool(value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16)
