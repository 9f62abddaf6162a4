"""Round the linear layers of an fp32 decoder to nearest with ONNX Runtime's own quantizer. Runs in a peer's environment.

python rtn.py model.onnx OUT_FOLDER     writes OUT_FOLDER/model.onnx: 4 bits, symmetric, blocks of 32; the head stays in fp32
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import onnx
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

BITS, BLOCK_SIZE, ACCURACY_LEVEL = 4, 32, 4


def main() -> None:
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    model = onnx.load(source)
    heads = [node.name for node in model.graph.node if node.op_type == "MatMul" and "lm_head" in node.name]
    quantizer = MatMulNBitsQuantizer(
        model, BITS, BLOCK_SIZE, is_symmetric=True, accuracy_level=ACCURACY_LEVEL, nodes_to_exclude=heads
    )
    quantizer.process()
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source.with_name("genai_config.json"), out / "genai_config.json")
    quantizer.model.save_model_to_file(str(out / "model.onnx"), use_external_data_format=True)
    rounded = sum(node.op_type == "MatMulNBits" for node in quantizer.model.model.graph.node)
    print(json.dumps({"tool": f"onnxruntime {version('onnxruntime')}", "layers": rounded, "kept_fp32": heads}))


if __name__ == "__main__":
    main()
