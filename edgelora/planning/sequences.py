"""The shape of an encoder-decoder: its layers together, as those of an encoder whose rows are source and target."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from edgelora.planning.shape import ModelShape

if TYPE_CHECKING:
    from edgelora.models.source import ModelSource
    from edgelora.tasks.base import Task


def seq2seq_shape(source: ModelSource, task: Task) -> ModelShape:
    """Return the widths and matrices of an encoder-decoder.

    A decoder layer has a second attention, over the source: each token of a row counts as if both sides' layers were an
    encoder's, which the probe corrects.
    """
    from torch import nn

    from edgelora.models.seq2seq import build_seq2seq, stack
    from edgelora.models.tables import tables

    network = build_seq2seq(source.config, task.auto_class)
    read = tables(network)
    apart = {path for table in read for path in table.modules}
    linears = tuple(
        (path, module.weight.shape[0], module.weight.shape[1])
        for path, module in network.named_modules()
        if isinstance(module, nn.Linear) and path not in apart
    )
    sizes = {table.path: tuple(network.get_parameter(f"{table.path}.weight").shape) for table in read}
    hidden = Counter(inputs for _, _, inputs in linears).most_common(1)[0][0]
    inner = max(outputs for _, outputs, _ in linears)
    queries = max((n for path, n, _ in linears if path.rpartition(".")[2] in ("q", "q_proj", "query")), default=hidden)
    return ModelShape(
        encoder=True,
        layers=len(stack(network.get_encoder())) + len(stack(network.get_decoder())),
        hidden=hidden,
        inner=inner,
        queries=queries,
        keys=queries,
        vocab=max(rows for rows, _ in sizes.values()),
        gated=any(path.endswith("wi_1") for path, _, _ in linears),
        linears=linears,
        tables=tuple((rows, width) for rows, width in sizes.values()),
        merged_bytes=None,
        dropout=float(source.config.get("dropout", source.config.get("dropout_rate", 0.1)) or 0) > 0,
    )
