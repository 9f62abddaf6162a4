"""What Whisper hears and how it writes: the feature extractor and the decoder's side of its folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from edgelora.audio import AudioProcessor
from edgelora.errors import ModelError
from edgelora.search import Search
from edgelora.times import STEP, Times
from edgelora.writing import Writing

NO_TIMES = "<|notimestamps|>"
FIRST_MULTILINGUAL = 51865  # tokens from which on a vocabulary has languages (OpenAI's whisper, tokenizer.py)


class Transcribing(Writing):
    """Targets as Whisper was trained on them: the prompt, the text after a space, the end.

    The prompt says to transcribe without times: <|startoftranscript|>, the language and <|transcribe|> where the vocabulary has
    several, <|notimestamps|>.
    """

    @cached_property
    def prompt(self) -> tuple[int, ...]:
        names = [NO_TIMES]
        if int(self.settings.get("vocab_size") or 0) >= FIRST_MULTILINGUAL:
            names = [f"<|{self.settings.get('language') or 'en'}|>", "<|transcribe|>", NO_TIMES]
        found = [self.target.native.token_to_id(name) for name in names]
        known = [int(token) for token in found if token is not None]
        if len(known) < len(names):
            raise ModelError(f"the tokenizer lacks one of {', '.join(names)}", hint="the model's own tokenizer.json has them")
        return (self.start, *known)

    @cached_property
    def search(self) -> Search:
        places = int(self.settings.get("max_target_positions") or 448)
        return Search.from_settings(self.settings, self.prompt, self.eos).limited(places - len(self.prompt))

    def times(self, seconds: float) -> Times:
        """Return the tokens of time of a window of so many seconds. Raises ModelError where the model has none."""
        none, end = self.prompt[-1], self.eos[0]
        times = Times(none + 1, none + 1 + round(seconds / STEP), none, end)
        if int(self.settings.get("vocab_size") or 0) <= times.last:
            raise ModelError("the model has no tokens of time", hint="leave --times out")
        return times

    def encode_target(self, text: str) -> list[int]:
        return [*self.prompt[1:], *self.target.encode(f" {text.strip()}", add_special_tokens=False), self.eos[0]]


@dataclass(frozen=True)
class Listening:
    audio: AudioProcessor
    writing: Transcribing

    @property
    def times(self) -> Times:
        """The tokens of time of the model's window. Raises ModelError where it has none."""
        return self.writing.times(int(self.audio.window or 0) / self.audio.rate)

    @classmethod
    def from_folder(cls, folder: Path) -> Listening:
        """Raises ModelError for a folder without a feature extractor of a fixed window, or without tokenizer.json."""
        audio = AudioProcessor.from_folder(folder)
        if audio.window is None:
            raise ModelError(
                f"{folder} is for sounds of any length; speech recognition is with Whisper",
                hint="--task speech-recognition-ctc is for wav2vec2 and its kind",
            )
        writing = Transcribing.from_folder(folder)
        assert isinstance(writing, Transcribing)
        return cls(audio, writing)
