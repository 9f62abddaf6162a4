"""An encoder-decoder: transformers' own class, frozen and quantized like any network, its LM head computed in tiles.

Where the class has its LM head it gives back what the head would read, so that no `[tokens, vocabulary]` tensor is formed:
`models/head.py` takes the hidden states at supervised positions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from edgelora.models.base_file import BaseWeights, open_base
from edgelora.models.base_layout import Section, own_bits
from edgelora.models.build import build_network
from edgelora.models.head import Head
from edgelora.models.linear import FrozenWeight
from edgelora.models.names import Renamings
from edgelora.models.network import Network, fill, network_sections
from edgelora.models.parts import Parts
from edgelora.models.source import ModelSource
from edgelora.models.tables import compute_positions, replace_tables, tables
from edgelora.search import Search, search
from edgelora.tasks.base import Task

FINAL_BIAS = "final_logits_bias"
TARGETS = ("starts", "positions", "targets")  # of a batch: for the loss alone


class Seq2Seq(Network):
    """`network` is transformers' model, whose "logits" are hidden states; `head` makes logits of them."""

    def __init__(self, network: Any, head: Head) -> None:
        super().__init__(network, (), ("logits",))
        self.head = head

    def inputs_of(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in batch.items() if name not in TARGETS}

    def states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the head reads at each place of decoder_input_ids, `[B·T, H]`."""
        found: Tensor = self.network(**self.inputs_of(batch), use_cache=False).logits
        return found.reshape(-1, found.shape[-1])

    def nll(self, states_SH: Tensor, targets_S: Tensor) -> Tensor:
        """Return the summed negative log-likelihood of target tokens."""
        return self.head.nll(states_SH, targets_S)

    def write(self, batch: Mapping[str, Tensor], settings: Search) -> list[list[int]]:
        """Return what is written about each row of the encoder's inputs, without the token that ends it."""
        inputs = {name: tensor for name, tensor in self.inputs_of(batch).items() if not name.startswith("decoder_")}
        steps = TorchSteps(self, inputs)
        return search(steps, steps.count, settings)

    def _wrapped(self, layer: nn.Module, index: int, count: int) -> Callable[..., Any]:
        """A decoder layer that is computed again keeps all its inputs, in fp32."""
        if index < len(stack(self.network.get_encoder())):
            return super()._wrapped(layer, index, count)
        return functools.partial(self._keep_inputs, layer.forward, index < count - self._keeping.kept_blocks)

    def _keep_inputs(self, forward: Any, again: bool, *args: Any, **kwargs: Any) -> Any:
        """Compute a decoder layer; `again`: in backward too. Its gradient goes to what the encoder gave as well."""
        if not (again and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    def _layers(self) -> list[nn.Module]:
        """Return the encoder's layers, then the decoder's."""
        return [*stack(self.network.get_encoder()), *stack(self.network.get_decoder())]


class TorchSteps:
    """The decoder step by step (search.Steps), with its cache; the encoder is run once."""

    def __init__(self, model: Seq2Seq, inputs: Mapping[str, Tensor]) -> None:
        self.model = model
        self.count = len(next(iter(inputs.values())))
        encoder = model.network.get_encoder()
        self.encoded = encoder(**inputs, return_dict=True)
        self.mask = inputs.get("attention_mask")
        self.cache: Any = None

    def start(self, prompt: Sequence[int]) -> Any:
        return self._run(torch.tensor([list(prompt)] * self.count))

    def step(self, tokens: Any, rows: Any) -> Any:
        chosen = torch.from_numpy(rows)
        self.cache.batch_select_indices(chosen)
        self.encoded.last_hidden_state = self.encoded.last_hidden_state[chosen]
        self.mask = None if self.mask is None else self.mask[chosen]
        return self._run(torch.from_numpy(tokens)[:, None])

    def _run(self, ids: Tensor) -> Any:
        mask = {} if self.mask is None else {"attention_mask": self.mask}
        found = self.model.network(
            encoder_outputs=self.encoded, decoder_input_ids=ids, past_key_values=self.cache, use_cache=True, **mask
        )
        self.cache = found.past_key_values
        return self.model.head.logits(found.logits[:, -1]).numpy()


def stack(side: nn.Module) -> list[nn.Module]:
    """Return the repeated layers of an encoder or a decoder: its first list of modules."""
    return list(next((module for module in side.modules() if isinstance(module, nn.ModuleList)), ()))


def build_seq2seq(config: dict[str, Any], auto_class: str) -> Any:
    """Return transformers' encoder-decoder of a config.json: parameters on the meta device, all else real."""
    network = build_network(config, auto_class)
    if getattr(network.get_encoder(), "pooler", None) is not None:
        network.get_encoder().pooler = None  # made for the first place, which no decoder asks for
    network.tie_weights()
    compute_positions(network)
    return network


def load_seq2seq(
    source: ModelSource, task: Task, *, base_bits: int, block_size: int, layer_bits: Mapping[str, int] | None = None
) -> Seq2Seq:
    """Return the model with its frozen weights in `base_bits`; tables keep at least 8.

    Raises ModelError for a model type that has no such class, and for missing or misshapen tensors, all at once.
    """
    network = build_seq2seq(source.config, task.auto_class)
    source = Renamings.of(network).fit(source)
    found = tables(network)
    own = [Section(tables=tuple(table.path for table in found))]
    sections = own + network_sections(network, source, Parts(), base_bits, skip={path for t in found for path in t.modules})
    weights = open_base(source, own_bits(sections, layer_bits or {}), base_bits, block_size)
    bits = max(base_bits, 8)
    frozen = {table.path: FrozenWeight.store(weights.read_linear(table.path), bits, block_size) for table in found}
    head = find_head(network, weights, frozen)
    replace_tables(network, frozen)
    fill(network, weights, base_bits, block_size, Parts(), [], set())
    network.requires_grad_(False)
    if head.bias is not None and hasattr(network, FINAL_BIAS):
        setattr(network, FINAL_BIAS, torch.zeros(1, 1))
    return Seq2Seq(network, head)


def read_head(source: ModelSource, task: Task) -> Head:
    """Return the LM head as its source has it, without the rest of the model."""
    network = build_seq2seq(source.config, task.auto_class)
    source = Renamings.of(network).fit(source)
    table = next(table for table in tables(network) if table.head is not None)
    return find_head(network, source, {table.path: FrozenWeight(source.read_linear(table.path))})


def find_head(network: Any, weights: ModelSource | BaseWeights, frozen: Mapping[str, FrozenWeight]) -> Head:
    """Return the LM head with its bias, which is the module's own, or one that the class adds to the logits (BART's)."""
    table = next(table for table in tables(network) if table.head is not None)
    names = set(weights.names())
    own = getattr(network.get_submodule(str(table.head)), "bias", None)
    found = [name for name, value in network.named_parameters(remove_duplicate=False) if value is own and name in names]
    found += [FINAL_BIAS] if hasattr(network, FINAL_BIAS) and FINAL_BIAS in names else []
    bias = weights.read(found[0]).float().reshape(-1).clone() if found else None
    return Head(frozen[table.path], bias=bias)
