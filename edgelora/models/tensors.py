"""Which tensors of a model ship, and which of them are layers on the quantization grid: the plan that `merge` follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from edgelora.errors import ModelError
from edgelora.models.layout import decoder_shapes
from edgelora.models.names import Renamings
from edgelora.models.parts import Parts, within_attention
from edgelora.models.spec import DecoderSpec
from edgelora.tasks import TASKS, get_task
from edgelora.tasks.base import Task

GENERATION = "text-generation"


@dataclass(frozen=True)
class Layout:
    """linears: paths of linear layers, in the order of the data's way. embeddings: paths of what is looked up by token, and
    of an LM head of its own: 8 bits where the linears get 4. plain: names of tensors that stay fp32."""

    linears: tuple[str, ...]
    embeddings: tuple[str, ...]
    plain: tuple[str, ...]
    parts: Parts | None = None  # of a network: its base and its head
    renamings: Renamings | None = None  # of a network's checkpoint
    architecture: str = ""  # the class of transformers, where the checkpoint may name another one
    tied_head: str | None = None  # path of an LM head that is the embedding
    transposed: bool = False  # transformers' class keeps linear weights as [K, N] (GPT-2's Conv1D)

    def in_head(self, name: str) -> bool:
        """Tell whether a tensor belongs to a network's head."""
        return self.parts is not None and self.parts.in_head(name)

    def names(self) -> list[str]:
        """Return the names of all tensors that ship."""
        return [*(f"{path}.weight" for path in (*self.embeddings, *self.linears)), *self.plain]


def guess_task(config: dict[str, Any]) -> str:
    """Return the task that config.json's `architectures` stands for: the first one with that class of transformers."""
    heads = {name: get_task(name).auto_class.removeprefix("AutoModel") for name in TASKS}
    heads = {name: head for name, head in heads.items() if head}  # a base alone could be for anything
    for architecture in config.get("architectures") or []:
        for name in heads:  # speech that is classified, too, is …ForSequenceClassification
            if class_of(config, get_task(name).auto_class) == architecture:
                return name
        for name, head in heads.items():
            if architecture.endswith((head, "LMHeadModel") if name == GENERATION else head):
                return name
    found = ", ".join(config.get("architectures") or []) or "none"
    allowed = ", ".join(f"…{head}" for head in dict.fromkeys(heads.values()))
    raise ModelError(
        f"the model has no head that EdgeLoRA ships: {found}; allowed: {allowed}",
        hint="edgelora finetune MODEL DATA -o RUN, then edgelora export RUN -o BUNDLE",
    )


def class_of(config: dict[str, Any], auto_class: str) -> str | None:
    """Return the name of the class that an auto class of transformers takes for a config.json, None where it has none."""
    import transformers

    mapping: Any = getattr(transformers, auto_class)._model_mapping._model_mapping
    found = mapping.get(config.get("model_type"))
    return None if found is None else str(found[0] if isinstance(found, tuple | list) else found)


def decoder_layout(spec: DecoderSpec) -> Layout:
    """Linear layers of the blocks, the embedding and an LM head of its own go on the grid."""
    linears = tuple(spec.weight(role, layer) for layer in range(spec.num_layers) for role in spec.linear_roles)
    embeddings = (spec.weight("embed"),) if spec.tied else (spec.weight("embed"), spec.weight("head"))
    quantized = {f"{path}.weight" for path in (*linears, *embeddings)}
    plain = tuple(name for name in decoder_shapes(spec) if name not in quantized)
    tied_head = spec.weight("head") if spec.tied else None
    return Layout(linears, embeddings, plain, tied_head=tied_head, transposed=spec.transposed)


def model_layout(config: dict[str, Any], task: str) -> Layout:
    """Return the layout of a model for a task: of a decoder, or of transformers' own class."""
    if task == GENERATION:
        from edgelora.models.families import decoder_spec

        return decoder_layout(decoder_spec(config))
    wanted = get_task(task)
    return seq2seq_layout(config, wanted.auto_class) if wanted.writes else network_layout(config, wanted)


def network_layout(config: dict[str, Any], task: Task) -> Layout:
    """Read the layout off transformers' class for a task, built without weights.

    Linear layers of the base and the word embedding go on the grid. The head (everything outside of the base) was trained as
    it is and stays fp32, like convolutions, norms and their statistics, biases and the small position and type embeddings.
    """
    from edgelora.models.build import build_network

    model = build_network(config, task.auto_class)
    parts = Parts.of(model, task)
    words = word_embedding(model)
    modules = dict(model.named_modules())
    linears = tuple(
        path
        for path, module in modules.items()
        if isinstance(module, torch.nn.Linear) and not parts.in_head(path) and not within_attention(module)
    )
    embeddings = tuple(path for path, module in modules.items() if module is words)
    quantized = {f"{path}.weight" for path in (*linears, *embeddings)}
    counters = ".num_batches_tracked"  # of batch norm: nothing reads it once training is over
    plain = tuple(name for name in model.state_dict() if name not in quantized and not name.endswith(counters))
    architecture = getattr(model, "architecture", type(model).__name__)
    return Layout(linears, embeddings, plain, parts, Renamings.of(model), architecture)


def seq2seq_layout(config: dict[str, Any], auto_class: str) -> Layout:
    """Read the layout off transformers' class of an encoder-decoder: each table that several modules share is there once."""
    from edgelora.models.seq2seq import build_seq2seq
    from edgelora.models.tables import tables

    model = build_seq2seq(config, auto_class)
    found = tables(model)
    read = {path for table in found for path in table.modules}
    modules = dict(model.named_modules())
    linears = tuple(path for path, module in modules.items() if isinstance(module, torch.nn.Linear) and path not in read)
    embeddings = tuple(table.path for table in found)
    apart = {f"{path}.weight" for path in (*linears, *read)}
    shared = dict(model.named_parameters())  # without the other names of the same parameter
    plain = [
        name for name in model.state_dict() if name not in apart and (name in shared or name in dict(model.named_buffers()))
    ]
    tied = next((table.head for table in found if table.head not in (None, table.path)), None)
    kind = type(model).__name__
    return Layout(linears, embeddings, tuple(plain), Parts(), Renamings.of(model), architecture=kind, tied_head=tied)


def word_embedding(model: Any) -> torch.nn.Module | None:
    """Return the table that tokens are looked up in; None of a network that reads no tokens."""
    reader = getattr(model, "text_model", model)
    try:
        table = reader.get_input_embeddings()
    except NotImplementedError:
        return None
    return table if isinstance(table, torch.nn.Embedding) else None
