"""How a network with a CTC head hears and spells: the feature extractor, and the letters of vocab.json. numpy only.

Source: Wav2Vec2CTCTokenizer of transformers, and Graves et al. (10.1145/1143844.1143891), sections 3 and 4: of a path over
frames repeated letters count once, and blanks, which part them, not at all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelora.audio import AudioProcessor
from edgelora.errors import DataError, ModelError
from edgelora.tokenizer import read_config, token_text

DEFAULTS = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "word_delimiter_token": "|"}
VOCABULARY = "vocab.json"


@dataclass(frozen=True)
class Spelling:
    """letters: of each output, its text; blank: the output that stands for none; space: the one between words, None where words
    are not told apart; special: outputs that are no text; layers: kernel and stride of each convolution over the samples."""

    audio: AudioProcessor
    letters: Mapping[int, str]
    blank: int
    space: int | None
    special: frozenset[int]
    layers: tuple[tuple[int, int], ...]
    lower: bool = False

    @classmethod
    def from_folder(cls, folder: Path) -> Spelling:
        """Raises ModelError for a folder without a feature extractor of waveforms, or without letters."""
        config, audio = read_config(folder / "config.json"), AudioProcessor.from_folder(folder)
        settings: dict[str, Any] = dict(DEFAULTS)
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            settings |= read_config(folder / name)
        if audio.window is not None or "conv_kernel" not in config:
            raise ModelError(f'a CTC head spells what a network on waveforms hears; this model is "{config.get("model_type")}"')
        outputs = read_letters(folder, settings.get("target_lang"))
        names = {name: token_text(settings.get(name)) for name in DEFAULTS}
        blank = outputs.get(str(names["pad_token"]))
        if blank is None or config.get("pad_token_id") not in (None, blank):
            found = f"config.json has {config.get('pad_token_id')}, {VOCABULARY} has {blank}"
            raise ModelError(f"which output is the blank is not clear: pad_token_id in {found}")
        special = {outputs[str(names[name])] for name in DEFAULTS if names[name] in outputs}
        space = outputs.get(str(names["word_delimiter_token"]))
        layers = tuple(zip(map(int, config["conv_kernel"]), map(int, config["conv_stride"]), strict=True))
        letters = {output: text for text, output in outputs.items()}
        return cls(audio, letters, blank, space, frozenset(special - {space}), layers, bool(settings.get("do_lower_case")))

    def frames(self, samples: int) -> int:
        """Return how many outputs a waveform of so many samples has."""
        for kernel, stride in self.layers:
            samples = (samples - kernel) // stride + 1
        return samples

    def encode(self, text: str) -> NDArray[np.int32]:
        """Return the outputs that spell a text, without repetition and blanks; what is no letter or figure parts words.

        Raises DataError for letters and figures that the model has not, and for a text without any.
        """
        known = {letter: output for output, letter in self.letters.items() if output not in self.special}
        small, large = (any(case(letter) for letter in known if len(letter) == 1) for case in (str.islower, str.isupper))
        text = text if small == large else text.lower() if small else text.upper()
        unknown = sorted({letter for letter in text if letter.isalnum() and letter not in known})
        if unknown:
            hint = "write numbers as words" if any(letter.isdigit() for letter in unknown) else None
            raise DataError(f'the text has "{"".join(unknown)}", which is not among the letters of the model', hint=hint)
        words = "".join(letter if known.get(letter, self.space) != self.space else " " for letter in text).split()
        if not words:
            raise DataError("the text has no letter of the model")
        found = [[known[letter] for letter in word] for word in words]
        parted = [output for word in found for output in ([] if self.space is None else [self.space]) + word]
        return np.array(parted if self.space is None else parted[1:], dtype=np.int32)

    def spell(self, outputs: Sequence[int]) -> str:
        """Return the text of outputs as they are, one after the other."""
        text = "".join(" " if output == self.space else self.letters.get(output, "") for output in outputs)
        text = " ".join(text.split())
        return text.lower() if self.lower else text

    def words(self, logits: NDArray[Any]) -> list[dict[str, Any]]:
        """Return [{"word", "start", "end"}], seconds, of the likeliest path through logits [frames, outputs]."""
        path = logits.argmax(axis=-1).tolist()
        second = math.prod(stride for _, stride in self.layers) / self.audio.rate
        found: list[dict[str, Any]] = []
        open_word = False
        for frame, output in enumerate(path):
            if output == self.space:
                open_word = False
            elif output not in self.special and output != self.blank:
                if not open_word:
                    found.append({"outputs": [], "start": round(frame * second, 2)})
                open_word = True
                if not found[-1]["outputs"] or path[frame - 1] != output:
                    found[-1]["outputs"].append(output)
                found[-1]["end"] = round((frame + 1) * second, 2)
        return [{"word": self.spell(word.pop("outputs")), **word} for word in found]


def read_letters(folder: Path, language: Any) -> dict[str, int]:
    """Return the outputs of vocab.json by their text; of one with several languages that one's. Raises ModelError."""
    path = folder / VOCABULARY
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content = content[language] if language in content and isinstance(content[language], dict) else content
        content = {**content, **read_config(folder / "added_tokens.json")}
        return {str(text): int(output) for text, output in content.items()}
    except FileNotFoundError:
        raise ModelError(f"{folder} has no {VOCABULARY}", hint="save the model's Wav2Vec2CTCTokenizer beside it") from None
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path} does not map letters to numbers: {error}") from None


def greedy(logits: NDArray[Any], blank: int) -> list[int]:
    """Return the outputs of the likeliest path through logits [frames, outputs], repeated ones once and without blanks."""
    path = logits.argmax(axis=-1)
    changes = np.concatenate([[True], path[1:] != path[:-1]])
    return [int(output) for output in path[changes] if output != blank]


def ctc_loss(logits: NDArray[Any], target: NDArray[Any], blank: int) -> float:
    """Return the negative log-likelihood of a target [T] over all paths through logits [frames, outputs]: inf without.

    Equations 6 and 7 of the paper: alpha[s] sums the paths that have come to place s of the target with blanks between.
    """
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    places = np.full(2 * len(target) + 1, blank)
    places[1::2] = target
    skips = np.zeros(len(places), dtype=bool)
    skips[2:] = (places[2:] != blank) & (places[2:] != places[:-2])
    alpha = np.full(len(places), -np.inf)
    alpha[:2] = log_p[0, places[:2]]
    for frame in log_p[1:]:
        one = np.concatenate([[-np.inf], alpha[:-1]])
        two = np.where(skips, np.concatenate([[-np.inf, -np.inf], alpha[:-2]]), -np.inf)
        alpha = np.logaddexp(np.logaddexp(alpha, one), two) + frame[places]
    return -float(np.logaddexp(alpha[-1], alpha[-2])) if len(target) else -float(alpha[-1])
