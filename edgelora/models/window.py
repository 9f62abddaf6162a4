"""A Whisper folder with a shorter window: short sounds need not be padded to 30 seconds, in training nor on the device.

    python -m edgelora.models.window MODEL SECONDS OUT

The encoder's sines of the places beyond the window are cut off, and config.json and preprocessor_config.json say so, which is
all that transformers and other loaders go by. The encoder was trained on 30 seconds: fine-tune what comes out before use.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from edgelora.errors import SettingsError, UserError
from edgelora.folder import new_folder, write_json
from edgelora.models.source import open_model, read_config
from edgelora.tokenizer import TOKENIZER_FILES
from edgelora.tokenizer import read_config as read_json

POSITIONS = "model.encoder.embed_positions.weight"
PER_SECOND = 50  # of the encoder's positions


def shorten(model: str, seconds: int, out: Path, *, overwrite: bool = False) -> None:
    """Write the folder `out`. Raises SettingsError for a window that the model does not have, ModelError for another model."""
    from safetensors.torch import save_file

    source = open_model(model)
    longest = int(source.config.get("max_source_positions") or 0)
    if not 0 < seconds * PER_SECOND <= longest:
        raise SettingsError(f"a window of {seconds} seconds; {model} has one of up to {longest // PER_SECOND}")
    with new_folder(out, overwrite=overwrite) as staging:
        for name in TOKENIZER_FILES:
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, staging / name)
        write_json(staging / "config.json", {**read_config(source.folder), "max_source_positions": seconds * PER_SECOND})
        extractor = read_json(staging / "preprocessor_config.json")
        rate, hop = int(extractor.get("sampling_rate", 16000)), int(extractor.get("hop_length", 160))
        samples = seconds * rate
        sizes = {"chunk_length": seconds, "n_samples": samples, "nb_max_frames": samples // hop}
        write_json(staging / "preprocessor_config.json", {**extractor, **sizes})
        tensors = {name: source.read(name) for name in source.names()}
        tensors[POSITIONS] = tensors[POSITIONS][: seconds * PER_SECOND].clone()
        save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})


def main() -> int:
    if len(sys.argv) != 4 or not sys.argv[2].isdecimal():
        print(__doc__, file=sys.stderr)
        return 2
    try:
        shorten(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
    except UserError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
