"""Numbers in text: lines of them become arrays, and a line that is no row of numbers is named."""

import os
import re
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import InputError, quoted

CHUNK = 4 * 2**20
"""Bytes parsed at once."""
MAX_THREADS = 4
"""Blocks that are parsed beside one another, at most; the reader of pandas leaves the other threads running."""
FAST_BYTES = 2**18
"""Blocks from this size on are given to pandas, whose import takes as long as parsing a smaller one."""
COMMENTS = (b"#", b"//", b"%")
_COMMENT = re.compile(rb"(?<!\d\.)#[^\n]*|(?<=\d\.)#(?!IND|INF|[QS]NAN)[^\n]*", re.IGNORECASE)
"""What a `#` begins, unless it is part of a number that is none, as in `-1.#IND` and `1.#QNAN` of Windows."""

_UTF8 = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_bytes(path: Path) -> bytes:
    """Read a text file with lines that end in a line feed, without its byte-order mark; UTF-16 becomes UTF-8.

    Raises:
        InputError: it holds binary data.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    if data.startswith(_UTF16):
        try:
            data = data.decode("utf-16").encode()
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not a text file ({error.reason})") from None
    data = data.removeprefix(_UTF8)
    if b"\0" in data[:4096]:
        raise InputError(f"{path}: not a text file, it holds binary data")
    if b"\r" not in data or data.count(b"\r") == data.count(b"\r\n"):
        return data
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")  # lines of old Macs, and files with both kinds


def without_comments(text: bytes) -> bytes:
    """Return a text without its comments that begin with `#`.

    Example:
        >>> without_comments(b"1 2 # two"), without_comments(b"1 -1.#IND")
        (b'1 2 ', b'1 -1.#IND')
    """
    return _COMMENT.sub(b"", text) if b"#" in text else text


def split_fields(line: bytes, separator: bytes | None) -> list[bytes]:
    """Split a line into its fields, without comment, quotes and blanks; one separator at the end is passed over.

    Example:
        >>> split_fields(b"1, 2,,3, # four", b",")
        [b'1', b'2', b'', b'3']
    """
    line = without_comments(line).strip()
    if not line or line.startswith(COMMENTS):
        return []
    if separator is None:
        return line.split()
    fields = [field.strip(b' \t"') for field in line.split(separator)]
    return fields[:-1] if not fields[-1] and len(fields) > 1 else fields


def number(field: bytes) -> float | None:
    """Return the number that a field is, None if it is none.

    Example:
        >>> number(b"-1.5e3"), number(b"1_0"), number(b"x")
        (-1500.0, None, None)
    """
    try:
        return None if b"_" in field else float(field)
    except ValueError:
        return None


def count_lines(data: bytes, start: int = 0, stop: int | None = None) -> int:
    """Return the number of lines in a part of a text, the last one with or without its line feed.

    Example:
        >>> count_lines(b"1\\n2\\n3")
        3
    """
    stop = len(data) if stop is None else stop
    count = 0
    for at in range(start, stop, CHUNK):  # ten times as fast as bytes.count where lines are short
        count += int(np.count_nonzero(np.frombuffer(data, np.uint8, min(CHUNK, stop - at), at) == 10))
    return count + int(stop > start and data[stop - 1 : stop] != b"\n")


def parse_lines(
    data: bytes,
    start: int = 0,
    stop: int | None = None,
    *,
    line: int = 1,
    where: str,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Parse lines of numbers between blanks, some megabytes at a time; blank lines and comments are passed over.

    Args:
        data: the text.
        start: where the first line begins.
        stop: where the last line ends; default the end.
        line: number of the first line, for messages.
        where: the file, for messages.

    Yields:
        The numbers of some lines, (n,) float64; how many there are in each line, (rows,); the numbers of the lines.

    Raises:
        InputError: an empty field, or one that is no number; the message names its line.
    """
    for block, table in _parsed(data, _blocks(data, start, stop, line), None, False):
        if table is None:
            yield _parse_each(data[block.start : block.stop], None, False, block.line, where)
        else:
            numbers = np.arange(block.line, block.line + block.lines)
            yield np.stack(table, axis=1).ravel(), np.full(block.lines, len(table)), numbers


def parse_rows(
    data: bytes,
    columns: int,
    keep: Sequence[int] | None = None,
    *,
    start: int = 0,
    stop: int | None = None,
    separator: bytes | None = None,
    decimal_comma: bool = False,
    line: int = 1,
    where: str,
) -> np.ndarray:
    """Parse lines that all hold the same count of numbers; see `parse_lines`.

    Args:
        data: the text.
        columns: numbers of each line.
        keep: the columns to return, in this order; default all.
        start: as for `parse_lines`, like the rest.
        separator: between numbers; None is any run of blanks.
        decimal_comma: commas are decimal points.

    Returns:
        (rows, len(keep)) float64, each column contiguous.

    Raises:
        InputError: a line with more or fewer numbers, and whatever `parse_lines` refuses.

    Example:
        >>> parse_rows(b"1 2 3\\n4 5 6\\n", 3, (2, 0), where="a.xyz").tolist()
        [[3.0, 1.0], [6.0, 4.0]]
    """
    keep = range(columns) if keep is None else keep
    blocks = _blocks(data, start, stop, line)
    found, filled = np.empty((len(keep), sum(block.lines for block in blocks))), 0
    for block, table in _parsed(data, blocks, separator, decimal_comma):
        if table is None or len(table) != columns:
            part = data[block.start : block.stop]
            flat, counts, numbers = _parse_each(part, separator, decimal_comma, block.line, where)
            wrong = counts != columns
            if wrong.any():
                place = int(wrong.argmax())
                raise InputError(
                    f"{where}: line {numbers[place]} holds {counts[place]} numbers, must be {columns} as in the others"
                )
            table = list(flat.reshape(-1, columns).T)
        size = len(table[0])
        for row, column in enumerate(keep):
            found[row, filled : filled + size] = table[column]
        filled += size
    return found[:, :filled].T


class _Block(NamedTuple):
    """Whole lines of a text: where they begin and end, the number of the first, and how many they are."""

    start: int
    stop: int
    line: int
    lines: int


def _blocks(data: bytes, start: int, stop: int | None, line: int) -> list[_Block]:
    stop, blocks = len(data) if stop is None else stop, []
    count = max(1, -(-(stop - start) // CHUNK))
    count += -count % MAX_THREADS if count > 1 else 0  # equal blocks: threads end together, no small rest is left
    size = (stop - start) // count + 1
    while start < stop:
        end = stop if stop - start <= size else data.rfind(b"\n", start, start + size) + 1
        if not end:  # a line longer than a block
            end = data.find(b"\n", start, stop) + 1 or stop
        blocks.append(_Block(start, end, line, count_lines(data, start, end)))
        start, line = end, line + blocks[-1].lines
    return blocks


def _parsed(
    data: bytes, blocks: list[_Block], separator: bytes | None, decimal_comma: bool
) -> Iterator[tuple[_Block, list[np.ndarray] | None]]:
    """Iterate over blocks and what `_parse_regular` returns for them; a few blocks are parsed at the same time."""
    if len(blocks) == 1:
        yield blocks[0], _parse_regular(data, blocks[0], separator, decimal_comma)
        return
    threads = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, MAX_THREADS)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[_Block, Future]] = deque()
        try:
            for block in blocks:
                waiting.append((block, pool.submit(_parse_regular, data, block, separator, decimal_comma)))
                if len(waiting) > threads:
                    done, result = waiting.popleft()
                    yield done, result.result()
            for done, result in waiting:
                yield done, result.result()
        finally:
            for _, result in waiting:
                result.cancel()


class _Part:
    """A part of a text as a file for pandas, which takes the bytes as they are: from `BytesIO` it would decode them."""

    def __init__(self, data: bytes, start: int, stop: int) -> None:
        self.data, self.at, self.stop = data, start, stop

    def read(self, size: int) -> bytes:
        start, self.at = self.at, min(self.stop, self.at + size)
        return self.data[start : self.at]

    def __iter__(self) -> Iterator[bytes]:
        raise NotImplementedError("pandas asks for this method of a file, and does not call it")


def _parse_regular(data: bytes, block: _Block, separator: bytes | None, decimal_comma: bool) -> list[np.ndarray] | None:
    """Parse a block of equal rows with the reader of pandas, four times as fast.

    Returns:
        Columns (rows,) float64, a row for each line; None if the block is small, or not such a block.
    """
    start, stop, _, lines = block
    if stop - start < FAST_BYTES:
        return None
    if any(data.find(mark, start, stop) >= 0 for mark in (b"r", b"R", b'"')):  # true is a number to pandas
        return None
    try:
        from pandas import read_csv
    except ImportError:
        return None
    if separator:
        separators = [separator.decode()]
    else:  # a run of blanks takes longer; with one blank where there are more, a field is empty
        separators = [r"\s+"] if re.search(rb"  |\t| \n|\n |^ ", data[start : start + 200]) else [" ", r"\s+"]
    for option in separators:
        try:
            # Not filtered: an empty field is an error, not NaN. Numbers are rounded exactly, as `float` does.
            table = read_csv(
                _Part(data, start, stop), sep=option, header=None, dtype=np.float64, na_filter=False, engine="c",
                quoting=3, low_memory=False, decimal="," if decimal_comma else ".",
            )  # fmt: skip
        except (ValueError, OverflowError):  # ParserError and UnicodeDecodeError are among them
            continue
        if len(table) == lines:
            return [table[column].to_numpy() for column in table]
    return None


def _parse_each(
    block: bytes, separator: bytes | None, decimal_comma: bool, line: int, where: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    flat, counts, numbers = array("d"), array("q"), array("q")
    for at, text in enumerate(block.split(b"\n"), line):
        fields = split_fields(text.replace(b",", b".") if decimal_comma else text, separator)
        if not fields:
            continue
        try:
            if b"_" in text:
                raise ValueError
            flat.extend(map(float, fields))
        except ValueError:
            place = next(i for i, field in enumerate(fields) if number(field) is None)
            if not fields[place]:
                raise InputError(
                    f"{where}: line {at}: field {place + 1} is empty; fill it in or remove the line"
                ) from None
            shown = quoted(split_fields(text, separator)[place].decode("utf-8", "replace"), 40)
            raise InputError(f"{where}: line {at}: {shown} is not a number") from None
        counts.append(len(fields))
        numbers.append(at)
    return tuple(np.array(part) for part in (flat, counts, numbers))  # type: ignore[return-value]
