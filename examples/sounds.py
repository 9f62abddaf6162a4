#!/usr/bin/env python3
"""Make the example sounds: tones that rise, fall or stay, and words in Morse code. Needs soundfile.

python examples/sounds.py
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

HERE = Path(__file__).parent
RATE = 8000  # samples per second
ROWS = {"train": 48, "valid": 12}
CHANGES = {"rising": 2.0, "falling": 0.5, "steady": 1.0}  # of the frequency, from the first sample to the last
CODES = {"a": ".-", "d": "-..", "e": ".", "i": "..", "m": "--", "n": "-.", "o": "---", "r": ".-.", "s": "...", "t": "-"}
WORDS = ("tea", "rain", "stone", "mine", "near", "dot", "sand", "moon", "ride", "east", "tram", "door")


def glide(first: float, last: float, seconds: float, loudness: float) -> list[float]:
    """Return a tone whose frequency goes from `first` to `last`, in Hz, faded in and out over 5 ms."""
    samples, phase = [], 0.0
    count, fade = round(seconds * RATE), RATE // 200
    for number in range(count):
        phase += 2 * math.pi * first * (last / first) ** (number / count) / RATE
        edge = min(1.0, number / fade, (count - number) / fade)
        samples.append(loudness * edge * math.sin(phase))
    return samples


def keyed(text: str, dot: float, pitch: float, loudness: float) -> list[float]:
    """Return text in Morse code: a dash is three dots long, letters are three dots apart, words seven."""
    samples = [0.0] * round(2 * dot * RATE)
    for letter in text:
        for mark in CODES.get(letter, ""):
            samples += glide(pitch, pitch, dot if mark == "." else 3 * dot, loudness) + [0.0] * round(dot * RATE)
        samples += [0.0] * round((2 if letter in CODES else 4) * dot * RATE)
    return samples


def noisy(samples: list[float], chance: random.Random) -> list[float]:
    return [sample + chance.gauss(0.0, 0.002) for sample in samples]


def write(path: Path, samples: list[float]) -> None:
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, RATE, subtype="PCM_16")


def main() -> None:
    chance = random.Random(11)
    for split, count in ROWS.items():
        lines = []
        for number in range(count):
            label, change = list(CHANGES.items())[number % len(CHANGES)]
            pitch, loudness = 220 * 2 ** chance.uniform(0, 2), chance.uniform(0.05, 0.4)
            tone = glide(pitch / math.sqrt(change), pitch * math.sqrt(change), chance.uniform(0.3, 0.5), loudness)
            write(HERE / "tone_kinds" / split / label / f"{number}.flac", noisy(tone, chance))
            text = " ".join(chance.sample(WORDS, chance.choice((1, 1, 2))))
            code = keyed(text, chance.uniform(0.03, 0.05), 440 * 2 ** chance.uniform(0, 1), chance.uniform(0.1, 0.4))
            write(HERE / "morse_words" / split / f"{number}.flac", code)
            lines.append(json.dumps({"audio": f"{split}/{number}.flac", "text": text}) + "\n")
        (HERE / "morse_words" / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
