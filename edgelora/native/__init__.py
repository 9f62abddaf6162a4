"""Decoders on processors that this package has kernels for: the bundle's own graph and weights, run without ONNX Runtime.

onnx_file reads the graph, program makes it a list of operations, library calls decoder.c, which computes them. What is not
known to one of them (another processor, operator or number of bits; a package that was built without a compiler) is left to
ONNX Runtime.
"""
