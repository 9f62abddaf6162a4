#!/usr/bin/env python3
"""Train a small network of a family from scratch: the base to adapt where no pretrained weights are at hand.

    python tools/pretrain_pictures.py scenes DATA --rows 400 --size 96 [--masks | --sentences | --blobs]
    python tools/pretrain_pictures.py train unet DATA OUT --size 96 --minutes 3

`scenes` draws discs, squares and triangles on noise, with their boxes or a sentence (rows.jsonl), or masks; --blobs: many round
things that overlap, of three kinds, with their boxes. `train` writes a folder in Hugging Face layout. A figure for a network
that was made so says so.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from small_networks import PICTURES

KINDS = ("disc", "square", "triangle")


def scene(random: Any, size: int) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Return pixels [size, size, 3], classes [size, size] and objects of 2 to 6 shapes on noise."""
    import numpy as np

    pixels = random.normal(random.uniform(40, 215, 3), random.uniform(5, 25), (size, size, 3))
    classes, objects = np.zeros((size, size), np.uint8), []
    rows, columns = np.mgrid[:size, :size]
    for _ in range(random.integers(2, 7)):
        kind, radius = int(random.integers(3)), random.uniform(size / 16, size / 6)
        y, x = random.uniform(radius, size - radius, 2)
        inside = (
            abs(rows - y) + abs(columns - x) * 2 <= radius
            if kind == 2
            else np.maximum(abs(rows - y), abs(columns - x)) <= radius
        )
        inside = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2 if kind == 0 else inside
        if not inside.any() or (classes[inside] > 0).any():
            continue
        pixels[inside] = random.normal(random.uniform(0, 255, 3), 8, (int(inside.sum()), 3))
        classes[inside] = kind + 1
        ys, xs = rows[inside], columns[inside]
        objects.append({"label": KINDS[kind], "box": [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]})
    return pixels.clip(0, 255).astype(np.uint8), classes, objects


# Kind of a blob → how many a picture has, their radius in shares of its side, how far a side may bulge
BLOBS = {"ring": ((4, 21), (0.07, 0.12), 0.04), "lump": ((0, 4), (0.09, 0.2), 0.2), "speck": ((0, 5), (0.02, 0.05), 0.1)}


def blobs(random: Any, size: int) -> tuple[Any, None, list[dict[str, Any]]]:
    """Return pixels [size, size, 3] and objects: pale rings that overlap, darker lumps and specks on a light ground, in colours
    that differ from picture to picture; some leave the picture."""
    import numpy as np

    ground = random.uniform(130, 250, 3)
    dark = ground * random.uniform(0.2, 0.75, 3)
    colours = {"ring": ground * random.uniform(0.55, 0.95, 3), "lump": dark, "speck": (dark * random.uniform(0.8, 1.2, 3))}
    pixels, objects, rings = np.broadcast_to(ground, (size, size, 3)).copy(), [], []
    rows, columns = np.mgrid[:size, :size]
    squeezed = random.uniform(0.75, 1.33)  # as pictures are that are made square
    for kind, (counts, radii, bulge) in BLOBS.items():
        for _ in range(random.integers(*counts)):
            y, x = random.uniform(0, size, 2)
            radius = random.uniform(*radii) * size
            if kind == "ring" and any(math.hypot(y - b, x - a) < 1.1 * radius for b, a in rings):
                continue
            angle = np.arctan2(rows - y, columns - x)
            edge = 1 + bulge * np.sin(random.integers(2, 6) * angle + random.uniform(0, 2 * math.pi))
            distance = np.hypot((rows - y) * squeezed, (columns - x) / squeezed) / (radius * edge)
            inside = distance <= 1
            if inside.sum() < 0.4 * math.pi * radius**2:
                continue
            cover = np.clip((1 - distance) * radius + 0.5, 0, 1) * random.uniform(0.7, 1.0)
            cover = cover * (1 - random.uniform(0.2, 0.7) * np.clip(1 - distance, 0, 1)) if kind == "ring" else cover
            pixels += cover[..., None] * (colours[kind] * random.uniform(0.9, 1.1) - pixels)
            rings += [(y, x)] if kind == "ring" else []
            ys, xs = rows[inside], columns[inside]
            sides = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
            objects.append({"label": kind, "box": sides})
    pixels = random.normal(pixels, random.uniform(2, 8))
    return pixels.clip(0, 255).astype(np.uint8), None, objects


def sentence(objects: list[dict[str, Any]]) -> str:
    """Return how many shapes of each kind there are: "one disc and three squares"."""
    counts = {kind: sum(entry["label"] == kind for entry in objects) for kind in KINDS}
    words = ("", "one", "two", "three", "four", "five", "six")
    return " and ".join(f"{words[n]} {kind}{'s' * (n > 1)}" for kind, n in counts.items() if n) or "nothing"


def write_scenes(folder: Path, count: int, size: int, *, masks: bool, sentences: bool, round_things: bool, seed: int) -> None:
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir() if masks else None
    lines = []
    for number in range(count):
        pixels, classes, objects = (blobs if round_things else scene)(random, size)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        if masks:
            Image.fromarray(classes).save(folder / "masks" / f"{number}.png")
        wanted: dict[str, Any] = {"text": sentence(objects)} if sentences else {"objects": objects}
        lines.append(json.dumps({"image": f"images/{number}.png", **wanted}))
    if masks:
        (folder / "classes.txt").write_text("\n".join(("ground", *KINDS)) + "\n", encoding="utf-8")
    else:
        (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_config(family: str, size: int, labels: Sequence[str]) -> Any:
    """Return the configuration of a family's network for pictures of size × size."""
    import transformers

    from edgelora.models import unet

    unet.register()
    _, kind, settings = PICTURES[family]
    side = [size, size] if family == "yolos" else size
    if "backbone_config" in settings:
        settings = {**settings, "backbone_config": transformers.AutoConfig.for_model(**settings["backbone_config"])}
    return transformers.AutoConfig.for_model(kind, **settings, image_size=side, id2label=dict(enumerate(labels)))


def train(family: str, data: str, out: Path, size: int, minutes: float, batch_size: int, rate: float) -> None:
    import torch
    import transformers

    from edgelora.data.check import scan
    from edgelora.images import ImageProcessor
    from edgelora.models.network import Network
    from edgelora.models.predictor import to_tensors
    from edgelora.tasks import get_task

    name = PICTURES[family][0]
    task, found = get_task(name), scan(data, task=name, columns=None, valid=None)
    found.problems.refuse(data)
    config = make_config(family, size, found.labels)
    preprocessor = {"size": {"height": size, "width": size}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    processor = ImageProcessor.from_config(preprocessor)
    torch.manual_seed(0)
    network = getattr(transformers, task.auto_class).from_config(config).train()
    model = Network(network, (), [output.name for output in task.outputs])
    rows = [task.encode(found.located(path, row), processor, found.labels) for path, _, row in found.rows("train")]

    def loss_of(numbers: Any) -> tuple[Any, int]:
        loss, items = task.loss(model, to_tensors(task.collate([rows[i] for i in numbers], processor)))
        return loss, int(items)

    descend(network, loss_of, len(rows), minutes, batch_size, rate)
    network.eval().save_pretrained(out)
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")


def descend(
    network: Any, loss_of: Callable[[Any], tuple[Any, int]], rows: int, minutes: float, batch_size: int, rate: float
) -> None:
    """Train a network for so many minutes; loss_of: numbers of rows → the loss of these, and what it sums."""
    import numpy as np
    import torch

    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-2)
    random, step, shown = np.random.default_rng(0), 0, 0.0
    # Of the processors: what others do meanwhile takes nothing away.
    started, allowed = time.process_time(), 60 * minutes * torch.get_num_threads()
    while (share := (time.process_time() - started) / allowed) < 1:
        loss, items = loss_of(random.choice(rows, batch_size))
        (loss / items).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * (0.05 + 0.95 * math.cos(share * math.pi / 2))
        optimizer.step()
        optimizer.zero_grad()
        step, shown = step + 1, 0.95 * shown + 0.05 * float(loss.detach()) / items
        if step % 50 == 0:
            print(f"step {step}, {share:.0%} of the time: loss {shown:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    drawn, trained = verbs.add_parser("scenes"), verbs.add_parser("train")
    drawn.add_argument("data", type=Path)
    drawn.add_argument("--rows", type=int, default=400)
    kind = drawn.add_mutually_exclusive_group()
    for flag in ("--masks", "--sentences", "--blobs"):
        kind.add_argument(flag, action="store_true")
    drawn.add_argument("--seed", type=int, default=0)
    trained.add_argument("family", choices=PICTURES)
    trained.add_argument("data")
    trained.add_argument("out", type=Path)
    trained.add_argument("--minutes", type=float, default=3.0)
    trained.add_argument("--batch-size", type=int, default=16)
    trained.add_argument("--learning-rate", type=float, default=1e-3)
    for verb in (drawn, trained):
        verb.add_argument("--size", type=int, default=96)
    given = parser.parse_args()
    if given.verb == "scenes":
        wanted = {"masks": given.masks, "sentences": given.sentences, "round_things": given.blobs}
        write_scenes(given.data, given.rows, given.size, **wanted, seed=given.seed)
    else:
        train(given.family, given.data, given.out, given.size, given.minutes, given.batch_size, given.learning_rate)


if __name__ == "__main__":
    main()
