"""CoNLL files: a token and its tag on a line, with a blank line between sentences; other columns in between are left out.

Cells are separated by tabs, or by spaces where a line has no tab. Comments ("# sent_id = 1") and -DOCSTART- lines are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from edgelora.data.lines import Report, text_lines
from edgelora.tasks.base import Row

LOOKED_AT = 200  # lines that tell a table from tagged tokens
TAG = re.compile(r"O|[BIESLU]-\S+")


def is_conll(path: Path) -> bool:
    """Tell whether a .tsv file has a tag at the end of each of its first lines, rather than a header and cells of any kind."""
    lines = islice(text_lines(path, lambda line, text: None), LOOKED_AT)
    found = [cells for _, line in lines if (cells := split(line)) and not line.startswith("#")]
    return bool(found) and all(len(cells) > 1 and TAG.fullmatch(cells[-1]) for cells in found)


def read_conll(path: Path, report: Report) -> Iterator[tuple[int, Row]]:
    """Yield (number of the first line, {"tokens", "tags"}) of each sentence. A sentence with a bad line is left out."""
    width, start, good = 0, 0, True
    tokens: list[str] = []
    tags: list[str] = []

    def noted(line: int, problem: str) -> None:
        nonlocal good
        good = False
        report(line, problem)

    for number, line in text_lines(path, noted):
        cells = split(line)
        comment = line.startswith("#") and len(cells) != width and (width > 0 or len(cells) != 2)
        if comment or (cells and cells[0] == "-DOCSTART-"):
            continue
        if not cells:
            if tokens and good:
                yield start, {"tokens": tokens, "tags": tags}
            tokens, tags, good = [], [], True
            continue
        width = width or len(cells)
        if len(cells) != width or width < 2:
            wanted = f"the lines before have {width}" if width > 1 else "a token and its tag are wanted"
            noted(number, f"{len(cells)} column{'s' if len(cells) > 1 else ''}; {wanted}")
        start = start if tokens else number
        tokens.append(cells[0])
        tags.append(cells[-1])
    if tokens and good:
        yield start, {"tokens": tokens, "tags": tags}


def split(line: str) -> list[str]:
    """Return the cells of a line, [] of a blank one."""
    text = line.rstrip("\r\n")
    if not text.strip():
        return []
    return [cell.strip() for cell in text.split("\t")] if "\t" in text else text.split()
