"""An encoder whose tokens are pooled into one embedding of a text, as sentence-transformers' mean pooling does it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Embedder(nn.Module):
    """transformers' base class under the name that classes with a head have it by, so that checkpoints and adapters fit."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.base_model_prefix = str(encoder.base_model_prefix)
        self.architecture = type(encoder).__name__
        self.config = encoder.config
        self._supports_attention_backend = encoder._supports_attention_backend
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None  # made for the first token, which is not asked for
        self.add_module(self.base_model_prefix, encoder)

    def get_input_embeddings(self) -> Any:
        return self.get_submodule(self.base_model_prefix).get_input_embeddings()  # type: ignore[operator]  # transformers' class

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> dict[str, Tensor]:
        """Return last_hidden_state [B, S, H] and sentence_embedding [B, H], the mean of the tokens in it, of length 1."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        encoder = self.get_submodule(self.base_model_prefix)
        hidden_BSH = encoder(input_ids=input_ids, attention_mask=attention_mask, **types)[0]
        weights_BS1 = attention_mask.unsqueeze(-1).to(hidden_BSH.dtype)
        mean_BH = (hidden_BSH * weights_BS1).sum(1) / weights_BS1.sum(1)
        return {"last_hidden_state": hidden_BSH, "sentence_embedding": torch.nn.functional.normalize(mean_BH, dim=-1)}
