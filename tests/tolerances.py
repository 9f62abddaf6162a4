"""Every tolerance of the tests, each with its reason. Keyword arguments of torch.testing.assert_close unless said otherwise."""

# Logits of a tiny model whose adapter is merged here against PEFT's, which adds the branch: fp32 sums in another order.
PEFT_LOGITS = {"rtol": 1e-4, "atol": 2e-5}
