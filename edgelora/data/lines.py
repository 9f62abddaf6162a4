"""Lines of a text file: UTF-8, and what is not is reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from edgelora.errors import DataError

Report = Callable[[int, str], None]
"""Called with the line number and what is wrong there."""

BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
UTF8_BOM = b"\xef\xbb\xbf"


def text_lines(path: Path, report: Report) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of a UTF-8 file, without a byte order mark; a line that is not text is reported and comes empty."""
    with path.open("rb") as file:
        head = file.read(3)
        if head[:2] in BOMS:
            raise DataError(f"{path.name} is {BOMS[head[:2]]} text; UTF-8 is wanted", hint="save it as UTF-8")
        file.seek(len(UTF8_BOM) if head == UTF8_BOM else 0)
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                report(number, f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}")
                text = ""
            else:
                if "\0" in text:
                    report(number, f"a NUL byte at position {line.index(0) + 1}")
                    text = ""
            yield number, text
