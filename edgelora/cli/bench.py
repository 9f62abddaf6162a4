"""`edgelora bench`: speed and memory of a bundle on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelora import console
from edgelora.cli.verb import FOLDER, threads_option, verb


@verb("bench")
@click.argument("bundle", type=FOLDER)
@click.argument("others", type=FOLDER, nargs=-1)
@threads_option
@click.option("--operators", is_flag=True, help="Where the time goes, by operator, in a run of its own.")
def bench(bundle: Path, operators: bool, **options: Any) -> dict[str, Any]:
    """Measure load time, memory and speed of a bundle.

    Decoders read a prompt of 256 tokens and write 128 after it. The bundle's adapters, and OTHERS, are measured in turn with
    it and set against it.
    """
    from edgelora.bench import bench as measure
    from edgelora.bench import shown_ways

    with console.progress("measuring"):
        result = measure(bundle, **options)
        if operators:
            from edgelora.operators import operators as by_operator

            result["operators"] = by_operator(bundle, threads=result["threads"])
    console.table(f"{bundle}, {result['precision']}, {result['threads']} threads", result["table"])
    if "ways" in result:
        console.table("Ways to ship what was learned", shown_ways(result["ways"]))
    if operators:
        console.table("Where the time goes", result["operators"])
    return result
