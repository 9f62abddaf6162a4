"""The parametrized description of a decoder, read from config.json. One description drives the torch model that trains
(`models/decoder.py`) and the ONNX graph that ships (`export/decoder.py`); neither knows a family's name.

A layer is: [norm] → attention → [norm] → residual → [norm] → MLP → [norm] → residual, where each norm may be absent.
Weights are found by role: `spec.weight("q", layer)` is the checkpoint's own module path, as PEFT and transformers name it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from edgelora.models.rope import Rope


@dataclass(frozen=True)
class Norm:
    """RMSNorm or LayerNorm. `offset` is added to the stored weight (Gemma stores w - 1)."""

    kind: str  # "rms" | "layer"
    eps: float
    offset: float = 0.0


@dataclass(frozen=True)
class DecoderSpec:
    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    activation: str  # "silu" | "gelu" (exact) | "gelu_tanh" | "relu"
    norm: Norm
    # Module paths by role, "{i}" for the layer. Linear roles: q k v | qkv, o, gate up | gate_up | up, down. Norm roles:
    # attn_in attn_out mlp_in mlp_out q_norm k_norm. Global roles: embed positions final_norm head.
    names: dict[str, str]
    biases: frozenset[str] = frozenset()  # linear roles that have a bias
    transposed: bool = False  # linear weights are stored [K, N] (GPT-2's Conv1D)
    ropes: tuple[Rope | None, ...] = ()  # per layer; None: no rotary embedding (SmolLM3's NoPE layers, GPT-2)
    windows: tuple[int | None, ...] = ()  # per layer: sliding-window size in tokens, the current one included
    qk_norm: str | None = None  # "head": over head_dim, "full": over all heads together (OLMo2)
    attention_scale: float = 0.0  # multiplies q·k
    attention_softcap: float = 0.0  # 0: none; else cap * tanh(scores / cap)
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0  # logits = head(hidden) * logits_scale
    logits_softcap: float = 0.0
    tied: bool = True
    special: dict[str, int | list[int] | None] = field(default_factory=dict)  # bos_token_id, eos_token_id, pad_token_id

    @property
    def gated(self) -> bool:
        """Whether the MLP is down(act(gate(x)) * up(x)) rather than down(act(up(x)))."""
        return "gate" in self.names or "gate_up" in self.names

    def weight(self, role: str, layer: int | None = None) -> str:
        """Return the module path of a role, such as "model.layers.3.self_attn.q_proj"."""
        return self.names[role].format(i=layer)

    def has(self, role: str) -> bool:
        return role in self.names

    @property
    def linear_roles(self) -> tuple[str, ...]:
        """The linear layers of a block, in the order of the data's way."""
        order = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down")
        return tuple(role for role in order if role in self.names)

    @property
    def norm_roles(self) -> tuple[str, ...]:
        order = ("attn_in", "q_norm", "k_norm", "attn_out", "mlp_in", "mlp_out")
        return tuple(role for role in order if role in self.names)

    def linear_shape(self, role: str) -> tuple[int, int]:
        """Return (outputs, inputs) of a linear role, or of "head"."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes = {
            "q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "qkv": (q + 2 * kv, hidden), "o": (hidden, q),
            "gate": (inner, hidden), "up": (inner, hidden), "gate_up": (2 * inner, hidden), "down": (hidden, inner),
            "head": (self.vocab_size, hidden),
        }  # fmt: skip
        return shapes[role]
