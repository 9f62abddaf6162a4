"""Every tolerance of the tests, each with its reason. Keyword arguments of torch.testing.assert_close unless said otherwise."""

# Logits of a tiny model whose adapter is merged here against PEFT's, which adds the branch: fp32 sums in another order.
PEFT_LOGITS = {"rtol": 1e-4, "atol": 2e-5}

# A weight with its adapter merged here in fp32 against PEFT's merge: the same product, summed in another order.
MERGED_WEIGHT = {"rtol": 1e-5, "atol": 1e-6}

# Logits and gradients of a tiny fp32 model against transformers': the same sums in another order, through two layers.
LOGITS_FP32 = {"rtol": 1e-4, "atol": 2e-5}

# Logits of a tiny fp32 bundle against transformers (numpy.testing): the same products in other kernels, cached or not.
ONNX_FP32_LOGITS = {"rtol": 1e-4, "atol": 5e-5}

# Summed loss of a tiny fp32 bundle, relative: float64 sums over logits as above.
ONNX_FP32_LOSS = 1e-5

# Metrics against the same numbers by hand, in float64 from float32 logits. Keyword arguments of pytest.approx.
METRIC = {"rel": 1e-6}

# Largest difference of a logit (they reach 25) of the real SmolLM2 in fp32 against transformers': thirty layers of sums
# in another order.
SMOLLM2_LOGITS = 2e-3

# Gradients against plain autograd (issue 3's bound), relative to the largest of the tensor: fp32 sums in another order.
GRADIENT_RELATIVE = 1e-4

# The attention kernel against double precision, relative to the largest: fp32 sums, and torch's own is as far off (7e-7).
ATTENTION_KERNEL = 2e-6

# A LoRA layer's output against the product with its merged weight: fp32 sums in another order.
MERGED_FORWARD = {"rtol": 1e-4, "atol": 1e-5}

# Logits of a fp32 graph in ONNX Runtime against transformers (numpy.testing.assert_allclose): sums in another order.
GRAPH_FP32 = {"rtol": 1e-4, "atol": 2e-4}

# Logits of a quantized graph at accuracy_level 0 against the dequantized model: float activations, sums in another order.
GRAPH_LEVEL_0 = {"rtol": 1e-4, "atol": 5e-4}

# Loss of a tiny fp32 line, run against merge against bundle, relative: the adapter as a branch or in the weight, other kernels.
ONNX_FP32_LINE_LOSS = 1e-4

# An encoder's logits in ONNX Runtime against torch, both fp32: other kernels, sums in another order (measured up to 2e-6).
ENCODER_FP32 = {"rtol": 1e-4, "atol": 1e-5}

# The same with MatMulNBits at level 4, which rounds activations to int8 in each block: logits of about 1 to 3 that pass two
# to six layers. Measured on random tiny models 0.002 to 0.04; a wrong graph is off by the logits' own size.
ENCODER_INT8_ACTIVATIONS = {"rtol": 0.0, "atol": 0.1}

# SkipLayerNormalization against Add and LayerNormalization: mean and variance are summed in another order.
SKIP_LAYER_NORM = {"rtol": 1e-5, "atol": 1e-6}

# Predicted against measured peak of a run: the C allocator and the kernels' own buffers vary by some ten MB between machines.
PLAN_PEAK_RELATIVE = 0.15

# The loss of one step computed in pieces and at once (relative): the same fp32 sums in another order.
SAME_STEP = 1e-4

# Loss of a bundle against that of its merged weights in torch (pytest.approx): the kernels round activations to 8 bits, which a
# tiny model of random weights feels more than a trained one.
LOSS_INT8_ACTIVATIONS = {"rel": 0.05}

# Factors that adapters begin with against PEFT's, or a decomposition against its formula: fp32 LAPACK, sums in another order.
INITIAL_FACTORS = {"rtol": 1e-4, "atol": 1e-5}

# AdamW and clipping against torch's: the same steps in another order of operations, and no 1e-6 beside the norm.
ADAMW_STEPS = {"rtol": 1e-5, "atol": 1e-6}

# Squared error left of 150 steps with moments in 8 bits against 32 (pytest.approx), a thousandth of that at the start: measured
# 14% more, for the moments of small gradients are coarse.
EIGHT_BIT_LOSS = {"rel": 0.25}

# Cosine of the principal directions of a sample found batch by batch with those found at once: what is weak is cut off between.
EVA_COSINE = 0.999

# Losses of the benchmark's peer (transformers, PEFT, padded) against ours (packed), relative: fp32 sums in another order, which
# a few steps of training carry on.
PEER_LOSS = 1e-4

# The same where what backward needs was kept in bf16 (issue 3's bound): eight bits of mantissa.
GRADIENT_BF16 = 1e-2

# A summed loss computed in tiles in fp32 against fp64 (pytest.approx): logits of some hundreds have errors of 1e-5 of them.
HEAD_LOSS = {"rel": 1e-5, "abs": 1e-3}

# KL divergence in tiles with fp32 logits against fp64 on the whole vocabulary (pytest.approx): logits of some tens.
AGREEMENT = {"rel": 1e-4}

# Mean loss of held-out rows by the benchmark of merging (fp32 logits, fp64 sums) against transformers (pytest.approx).
SCORED_LOSS = {"rel": 1e-5}

# PiSSA's randomized start (16 rounds of power iteration where singular values halve) against the exact principal part: PEFT
# does not store what it drew.
REDRAWN_PISSA = {"rtol": 1e-3, "atol": 1e-4}

# A weight without its principal part: PEFT decomposes it in fp32, here the vectors come from fp64.
PART_OF_WEIGHT = {"rtol": 1e-4, "atol": 1e-5}

# A product with bf16 operands beside the exact product of the rounded operands: its result is rounded to 8 bits, 2^-9 of it,
# and once more where the sum lies near a rounding boundary.
BF16_OUTPUT = 2**-8
# One layer's gradients with bf16 operands beside fp32: three roundings of 2^-9 at most add up to 3e-3 or so.
BF16_PRODUCT = 1e-2

# A combination of adapters against PEFT's, which decomposes the sum and multiplies it again, or against sums by hand in fp32.
COMBINED_WEIGHT = {"rtol": 1e-4, "atol": 2e-6}

# A classifier's probabilities beside those of the same text in another batch: padding changes the order of fp32 sums.
PADDED_BATCH = 1e-4
# Convolutions and whole small vision networks against torch's own: sums in another order, and batch norm as one product.
CONVOLUTION = {"rtol": 1e-4, "atol": 2e-5}
# Pixels against transformers' processors, which compute the same bytes and normalize in fp32 or fp64.
PIXELS = {"rtol": 0.0, "atol": 2e-6}
# Spectrograms against transformers' feature extractors, which keep fp32 (or complex64) between their steps where ours are fp64:
# logarithms of nearly silent bins feel it most.
FEATURES = {"rtol": 0.0, "atol": 3e-4}
# Resampling against scipy's resample_poly in fp64: a sum of some twenty to sixty fp32 products.
RESAMPLED = {"rtol": 0.0, "atol": 3e-6}

# Largest distance of a bundle's logits for the browser from the float reference, in standard deviations of the logits: float
# products of the same dequantized weights, summed in another order (rounded activations are off by 0.01 and more).
UNPACKED_FLOAT = 1e-4

# Probabilities in a browser against ONNX Runtime here (numpy.testing): the same float products, WebAssembly's kernels.
BROWSER_PROBABILITIES = {"rtol": 1e-4, "atol": 1e-5}
# Scores and boxes in pixels against transformers' (numpy.testing.assert_allclose): scores here are of fp64.
BOXES = {"rtol": 1e-5, "atol": 1e-4}
# Accuracy of int8 convolutions of a tiny, hardly trained network against fp32, on a dozen rows: three of them may turn.
INT8_ACCURACY = 0.3

# Logits of a tiny int4 bundle from a cached prefix against all of the prompt computed at once (numpy.testing): chunks of other
# sizes are summed in another order, and an activation at the edge of two int8 values may fall to the other side.
PREFIX_LOGITS = {"rtol": 1e-3, "atol": 1e-3}
# One product of integers, which are exact: scales are multiplied in another order.
INT8_PRODUCT = {"rtol": 1e-5, "atol": 1e-5}
# Keys and values, or logits, after prompts in 8 bits, mean difference by mean size: each rounding moves a value by up to 0.4%
# of its row's largest, which is three times its mean, and a few layers add theirs.
INT8_CACHE = 0.08

# A product by our kernels against float64 of the same rounded activations, relative to the largest: sums over blocks in fp32,
# and single activations between two codes that the norm's last bit decides (measured up to 4e-3).
NATIVE_PRODUCT = 1e-2

# Logits by our kernels against ONNX Runtime's, root of mean square relative to their deviation: rounding to 8 bits turns last
# bits into steps of 1/127 of a block, as between ONNX Runtime's own runs of one token and of several (measured up to 1e-2).
NATIVE_LOGITS = 3e-2
