"""Inference on the device: numpy, onnxruntime, tokenizers and jinja2; never torch or transformers.

    import edgelora
    model = edgelora.load("bundle")
    print(model.generate("turn the kitchen light off"))
    for piece in model.stream("tell me a story"): print(piece, end="")
    label, probability = classifier.classify(["where is my card?"])[0][0]

session (onnxruntime) ← decoder (KV cache), sampling ← generate (text) | classify (labels) ← model (the Python API)
← answer, chat, batch (the verbs) and predictor (for `evaluate`).
"""
