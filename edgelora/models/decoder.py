"""The decoder that trains: one parametrized block, driven by a DecoderSpec. It imports no modelling code."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from edgelora.models.attention import Cache, Context, Scores, attend_cached, attend_packed, rotated
from edgelora.models.elementwise import Activation, Elementwise, FrozenNorm
from edgelora.models.head import Head
from edgelora.models.linear import FrozenEmbedding, FrozenLinear
from edgelora.models.linear_group import LinearGroup, linears
from edgelora.models.recompute import Keeping, Stream
from edgelora.models.spec import DecoderSpec


class Block(nn.Module):
    """One layer: attention and MLP, each with its norms and its residual. `linears` and `norms` are keyed by role."""

    def __init__(self, spec: DecoderSpec, layer: int, linears: dict[str, nn.Module], norms: dict[str, nn.Module]) -> None:
        super().__init__()
        self.spec = spec
        self.layer = layer
        self.linears = nn.ModuleDict(linears)
        self.norms = nn.ModuleDict(norms)
        self._groups: dict[tuple[str, ...], LinearGroup] = {}

    def recall(self, hidden_TH: Tensor, context: Context) -> Tensor:
        """Compute the block for its gradients only: the last product, which no gradient needs, is left out."""
        return self.forward(hidden_TH, context, unfinished=True)

    def forward(self, hidden_TH: Tensor, context: Context, *, unfinished: bool = False) -> Tensor:
        spec = self.spec
        attended = self._attention(hidden_TH, context)
        hidden_TH = self._out("o", attended, None, "attn_out", hidden_TH)
        inner = self._linears(("gate_up",) if "gate_up" in self.linears else self._mlp_in, hidden_TH, self._norm("mlp_in"))
        act = Activation(spec.activation, gated=spec.gated)
        return self._out("down", inner, act, "mlp_out", hidden_TH, unfinished=unfinished)

    @property
    def _mlp_in(self) -> tuple[str, ...]:
        return ("gate", "up") if "gate" in self.linears else ("up",)

    def _norm(self, role: str) -> FrozenNorm | None:
        if role not in self.norms:
            return None
        norm = self.norms[role]
        assert isinstance(norm, FrozenNorm)
        return norm

    def _linears(
        self,
        roles: tuple[str, ...],
        x_TK: Tensor,
        f: Elementwise | None,
        residual: Tensor | None = None,
        unfinished: bool = False,
    ) -> Tensor:
        """Return the outputs of the layers of these roles side by side, of f(x); with a residual, added to it."""
        scale = self.spec.residual_scale if residual is not None else 1.0
        return linears(x_TK, self.group(roles), f, residual, scale, unfinished=unfinished)

    def group(self, roles: tuple[str, ...]) -> LinearGroup:
        """Return the layers of these roles, which have the same input, as one."""
        members = [self.linears[role] for role in roles]
        known = self._groups.get(roles)
        if known is None or known.modules != members:
            known = self._groups[roles] = LinearGroup(members)
        return known

    def _out(
        self, role: str, x_TK: Tensor, f: Elementwise | None, norm_role: str, hidden_TH: Tensor, *, unfinished: bool = False
    ) -> Tensor:
        """Return the residual plus a linear layer of f(x), where the family norms that layer's output, its norm."""
        norm = self._norm(norm_role)
        if norm is None:
            return self._linears((role,), x_TK, f, hidden_TH, unfinished=unfinished)
        return torch.add(hidden_TH, norm(self._linears((role,), x_TK, f)), alpha=self.spec.residual_scale)

    def _attention(self, hidden_TH: Tensor, context: Context) -> Tensor:
        """Return the heads' outputs `[T, heads * head_dim]`."""
        spec = self.spec
        q, k, v = self._heads(hidden_TH)
        rope = spec.ropes[self.layer]
        how = Scores(spec.attention_scale, spec.windows[self.layer], spec.attention_softcap)
        cache = context.cache
        if cache is None:
            return attend_packed(q, k, v, rope, context, how)
        if rope is not None:
            q, k = (rotated(x, *context.rotation(rope)) for x in (q, k))
        if cache.started:
            cache.append(self.layer, k, v)
            return attend_cached(q, cache, self.layer, how).flatten(1)
        cache.fill(self.layer, context.starts, k, v)
        return attend_packed(q, k, v, None, context, how)

    def _heads(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q `[T, heads, head_dim]`, k and v `[T, kv_heads, head_dim]`, normed where the family norms them."""
        spec = self.spec
        roles = ("qkv",) if "qkv" in self.linears else ("q", "k", "v")
        sizes = [spec.num_heads * spec.head_dim, *2 * [spec.num_kv_heads * spec.head_dim]]
        q, k, v = torch.split(self._linears(roles, hidden_TH, self._norm("attn_in")), sizes, -1)
        q_norm, k_norm = self._norm("q_norm"), self._norm("k_norm")
        if spec.qk_norm == "full" and q_norm is not None and k_norm is not None:
            q, k = q_norm(q), k_norm(k)
        q, k, v = (x.view(x.shape[0], -1, spec.head_dim) for x in (q, k, v))
        if spec.qk_norm == "head" and q_norm is not None and k_norm is not None:
            q, k = q_norm(q), k_norm(k)
        return q, k, v


def positions_of(starts: Tensor) -> Tensor:
    """Return the position of each token in its document, int64 `[T]`, for boundaries `[D + 1]`."""
    return torch.arange(int(starts[-1])) - torch.repeat_interleave(starts[:-1], starts.diff())


def _context(starts: Tensor) -> Context:
    """Return what the blocks need to know of packed documents with the boundaries `[D + 1]`."""
    bounds = [int(start) for start in starts]
    return Context(bounds, positions_of(torch.tensor(bounds)))


class Decoder(nn.Module):
    """A causal language model over packed documents: no padding, positions and attention restart with each document."""

    def __init__(
        self,
        spec: DecoderSpec,
        embed: FrozenEmbedding,
        blocks: Sequence[Block],
        final_norm: FrozenNorm,
        head: FrozenEmbedding | FrozenLinear,
        positions: FrozenEmbedding | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.embed = embed
        self.positions = positions
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = final_norm
        self.head = Head(head.weight, spec.logits_scale, spec.logits_softcap)
        self._stream: Stream | None = None
        self.keeping = Keeping()

    @property
    def stream(self) -> Stream | None:
        """Set when the weights are read from their file as they are needed, and dropped after."""
        return self._stream

    @stream.setter
    def stream(self, stream: Stream | None) -> None:
        self._stream = stream
        self.head = dataclasses.replace(self.head, release=None if stream is None else stream.drop_table)

    def states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the last hidden states `[T, H]` of a batch of packed documents."""
        return self.hidden(batch["ids"], batch["starts"])

    def hidden(self, ids_T: Tensor, starts: Tensor, prefix: tuple[int, Tensor] | None = None) -> Tensor:
        """Return the normed last hidden states `[T, H]` of packed documents.

        ids_T: int64 `[T]`, all documents one after the other; starts: int64 `[D + 1]`, 0 first and T last.
        prefix: a number of blocks and the hidden states `[T, H]` after them, which are not computed then.
        """
        return self._run(ids_T, _context(starts), prefix)

    @torch.no_grad()
    def prefix(self, ids_T: Tensor, starts: Tensor, blocks: int) -> Tensor:
        """Return the hidden states `[T, H]` after the first so many blocks, without a gradient."""
        context = _context(starts)
        return self.keeping.run(list(self.blocks)[:blocks], self._embedded(ids_T, context), context, stream=self.stream)

    def _embedded(self, ids_T: Tensor, context: Context) -> Tensor:
        hidden_TH: Tensor = self.embed(ids_T)
        if self.spec.embedding_scale != 1.0:
            hidden_TH = hidden_TH * self.spec.embedding_scale
        if self.positions is not None:
            hidden_TH = hidden_TH + self.positions(context.positions)
        return hidden_TH

    def _run(self, ids_T: Tensor, context: Context, prefix: tuple[int, Tensor] | None = None) -> Tensor:
        first, hidden_TH = prefix or (0, self._embedded(ids_T, context))
        hidden_TH = self.keeping.run(list(self.blocks), hidden_TH, context, stream=self.stream, first=first)
        normed: Tensor = self.final_norm(hidden_TH)
        return normed

    def nll(self, hidden_SH: Tensor, targets_S: Tensor) -> Tensor:
        """Return the summed negative log-likelihood of the targets int64 `[S]` after the hidden states `[S, H]`."""
        return self.head.nll(hidden_SH, targets_S)

    def logits(self, hidden_SH: Tensor) -> Tensor:
        """Return `[S, V]`: for tests, never in training."""
        return self.head.logits(hidden_SH)

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: frozenset[int], *, at_once: int = 512
    ) -> list[list[int]]:
        """Return the greedy continuation of each prompt, without the stop token.

        All prompts run together, one new token of each per step; a finished one leaves the batch. Before that, the prompts'
        own tokens run `at_once` together, or one prompt.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        if not prompts or max_new_tokens < 1:
            return answers
        spec = self.spec
        longest = max(len(prompt) for prompt in prompts)
        cache = Cache(spec.num_layers, len(prompts), spec.num_kv_heads, longest + max_new_tokens, spec.head_dim)
        hidden_BH = self._prefill(prompts, at_once, cache)
        rows = list(range(len(prompts)))
        for step in range(max_new_tokens):
            tokens = self.head.argmax(hidden_BH)
            going = [i for i, token in enumerate(tokens.tolist()) if token not in stop]
            for i in going:
                answers[rows[i]].append(int(tokens[i]))
            if not going or step + 1 == max_new_tokens:
                break
            if len(going) < len(rows):
                rows = [rows[i] for i in going]
                cache.keep(torch.tensor(going))
                tokens = tokens[going]
            hidden_BH = self._run(tokens, Context(range(len(rows) + 1), cache.lengths, cache=cache))
            cache.lengths += 1
        return answers

    def _prefill(self, prompts: Sequence[Sequence[int]], at_once: int, cache: Cache) -> Tensor:
        """Run the prompts into the cache, about `at_once` tokens together; return the state of each one's last, `[B, H]`."""
        states, first = [], 0
        while first < len(prompts):
            stop, tokens = first + 1, len(prompts[first])
            while stop < len(prompts) and tokens + len(prompts[stop]) <= at_once:
                tokens += len(prompts[stop])
                stop += 1
            starts = torch.tensor([0, *(len(prompt) for prompt in prompts[first:stop])]).cumsum(0)
            ids = torch.tensor([token for prompt in prompts[first:stop] for token in prompt])
            part = cache.part(first, stop)
            hidden_TH = self._run(ids, Context(starts.tolist(), positions_of(starts), cache=part))
            states.append(hidden_TH[starts[1:] - 1])
            part.lengths += starts.diff()
            first = stop
        return torch.cat(states)

    def linears(self) -> dict[str, nn.Module]:
        """Return the layers that adapters may go to, by checkpoint path in model order; the LM head is not among them."""
        return {self.spec.weight(role, layer): layers[role] for layer, role, layers in self._places()}

    def replace_linear(self, path: str, module: nn.Module) -> None:
        """Put `module` in the place of the layer at `path`; raises KeyError for a path that `linears` does not name."""
        for layer, role, layers in self._places():
            if self.spec.weight(role, layer) == path:
                layers[role] = module
                return
        raise KeyError(path)

    def _places(self) -> Iterator[tuple[int, str, nn.ModuleDict]]:
        """Yield (layer, role, the block's layers by role) of every linear layer."""
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            for role in self.spec.linear_roles:
                yield layer, role, block.linears
