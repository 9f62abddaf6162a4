"""The Python API: a bundle, loaded and ready."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.config import GenerateConfig, replace
from edgelora.errors import SettingsError, UserError
from edgelora.run.adapters import find
from edgelora.tasks import TASKS, get_task

if TYPE_CHECKING:
    from edgelora.bundle import Bundle
    from edgelora.run.adapters import Adapter
    from edgelora.run.classify import Classifier
    from edgelora.run.generate import Answer, Generator
    from edgelora.run.seq2seq import Writer

Prompt = str | Sequence[Mapping[str, Any]]  # a text, or chat messages {"role": …, "content": …}


def load(bundle: str | Path, *, threads: int | None = None, adapter: str | None = None, native: bool = True) -> Model:
    """Open a bundle, with one of its adapters if named, on `threads` threads (default: physical cores).

    Decoders run by kernels of our own where there are some for their graph and this processor, unless `native` is False;
    everything else by ONNX Runtime.
    Raises FolderError where it is no bundle or a damaged one, SettingsError where it has no such adapter.
    """
    from edgelora.bundle import open_bundle
    from edgelora.run.packed import mark_checked, packed_from

    opened = open_bundle(Path(bundle), known=packed_from)
    model = Model(opened, threads=threads, adapter=adapter, native=native)
    if model.runs_native:
        mark_checked(model.bundle.model_path)
    return model


class Model:
    """A loaded bundle. `generate` and `stream` for decoders, `classify` for classifiers, `use` for its adapters."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        adapter: str | None = None,
        native: bool = True,
    ) -> None:
        found = None if adapter is None else find(bundle, adapter)
        self.bundle = bundle
        self.task = bundle.task
        self.labels = bundle.labels
        self._generator: Generator | None = None
        self._classifier: Classifier | None = None
        self._writer: Writer | None = None
        if self.task == "text-generation":
            from edgelora.run.generate import Generator

            self._generator = Generator(bundle, threads=threads, adapter=found, native=native)
        elif self.task in TASKS and get_task(self.task).writes:
            from edgelora.run.seq2seq import Writer

            self._writer = Writer(bundle, threads=threads, adapter=found)
        elif self.task in TASKS:
            from edgelora.run.classify import Classifier

            self._classifier = Classifier(bundle, threads=threads, adapter=found)
        else:
            raise UserError(
                f'{bundle.folder} is for the task "{self.task}", which this EdgeLoRA cannot run',
                hint="pip install --upgrade edgelora",
            )

    @property
    def adapter(self) -> str | None:
        """The name of the adapter that acts, None for the base alone."""
        acting = (self._generator or self.answerer).adapter
        return None if acting is None else acting.name

    @property
    def runs_native(self) -> bool:
        """Whether kernels of our own run it, not ONNX Runtime."""
        return self._generator is not None and self._generator.decoder.bound is None

    def use(self, adapter: str | None) -> None:
        """Let the adapter of that name act from now on, or with None the base alone. Answers that are half written go on with
        it. Raises SettingsError where the bundle has no such adapter."""
        self.put_on(None if adapter is None else find(self.bundle, adapter))

    def put_on(self, adapter: Adapter | None) -> None:
        """Let an adapter act that may not be in the bundle (yet)."""
        (self._generator or self.answerer).use(adapter)

    @property
    def generator(self) -> Generator:
        if self._generator is None:
            raise UserError(f"{self.bundle.folder} is a {self.task} bundle: it writes no text")
        return self._generator

    @property
    def answerer(self) -> Classifier | Writer:
        """What answers rows of a task's columns: everything but a decoder."""
        return self._writer or self.classifier

    @property
    def writes(self) -> bool:
        """Whether an encoder and a decoder write its answers."""
        return self._writer is not None

    @property
    def writer(self) -> Writer:
        if self._writer is None:
            raise UserError(f"{self.bundle.folder} is a {self.task} bundle: it has no encoder and decoder")
        return self._writer

    @property
    def classifier(self) -> Classifier:
        if self._classifier is None:
            raise UserError(f"{self.bundle.folder} is a {self.task} bundle: it writes text, it has no labels")
        return self._classifier

    def generate(self, prompt: Prompt, config: GenerateConfig | None = None, **settings: Any) -> str:
        """Return the answer to a prompt or chat; `settings` are the fields of GenerateConfig."""
        return self.answer(prompt, config, **settings).text

    def answer(self, prompt: Prompt, config: GenerateConfig | None = None, **settings: Any) -> Answer:
        """Return the answer with its tokens and the reason why it ended."""
        return self.start(prompt, config, **settings).finished()

    def start(self, prompt: Prompt, config: GenerateConfig | None = None, **settings: Any) -> Answer:
        """Return an answer that is written while it is iterated over, piece by piece."""
        return self.generator.start(prompt, merge(config, settings))

    def stream(self, prompt: Prompt, config: GenerateConfig | None = None, **settings: Any) -> Iterator[str]:
        """Yield the answer in pieces of text as it is written."""
        return iter(self.start(prompt, config, **settings))

    def classify(self, texts: Sequence[str | tuple[str, str]], *, batch_size: int = 16) -> list[list[tuple[str, float]]]:
        """Return for each text, pair of texts or path of an image all (label, probability), the most probable first."""
        return self.classifier.classify(texts, batch_size=batch_size)

    def answers(
        self, rows: Sequence[Mapping[str, Any]], *, batch_size: int = 16, config: GenerateConfig | None = None
    ) -> list[Any]:
        """Return the answer to each row (its columns are the task's), as `edgelora run --json` has it; not for decoders.

        `config` is for answers that are written: translations, summaries.
        """
        taken = [dict(row) for row in rows]
        if self._writer is not None:
            return self._writer.answers(taken, batch_size=batch_size, config=config)
        return self.classifier.answers(taken, batch_size=batch_size)


def merge(config: GenerateConfig | None, settings: dict[str, Any]) -> GenerateConfig:
    """Return `config` (default: the defaults) with `settings` in its place, everything checked."""
    if isinstance(settings.get("stop"), str):
        settings = {**settings, "stop": (settings["stop"],)}
    checked = replace(GenerateConfig(), {**asdict(config or GenerateConfig()), **settings}, where="generation settings")
    if "" in (checked.stop or ()):
        raise SettingsError('generation settings: "stop" holds an empty string, which would end every answer before it begins')
    return checked
