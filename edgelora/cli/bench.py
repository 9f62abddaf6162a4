"""`edgelora bench`: speed and memory of a bundle on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelora import console
from edgelora.cli.verb import FOLDER, verb


@verb("bench")
@click.argument("bundle", type=FOLDER)
@click.argument("others", type=FOLDER, nargs=-1)
@click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: the physical cores.")
def bench(bundle: Path, **options: Any) -> dict[str, Any]:
    """Measure load time, memory and speed of a bundle.

    Decoders read a prompt of 256 tokens and write 128 after it. The bundle's adapters, and OTHERS, are measured in turn with
    it and set against it.
    """
    from edgelora.bench import bench as measure
    from edgelora.bench import shown_ways

    with console.progress("measuring"):
        result = measure(bundle, **options)
    console.table(f"{bundle}, {result['precision']}, {result['threads']} threads", result["table"])
    if "ways" in result:
        console.table("Ways to ship what was learned", shown_ways(result["ways"]))
    return result
