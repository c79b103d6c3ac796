"""Tables in Markdown."""

from collections.abc import Collection, Sequence


def markdown_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[int] = (), padded: bool = False
) -> str:
    """Return a table in Markdown; a `|` or a line break inside a cell is escaped.

    Args:
        head: titles of the columns.
        rows: cells, one for each title in each row.
        right: columns that are right-aligned.
        padded: pad the cells with spaces, so that the text is readable on a terminal.

    Example:
        >>> print(markdown_table(["name", "ms"], [["a", "1.0"], ["bcdef", "12.0"]], right=[1], padded=True))
        | name  |   ms |
        | ----- | ---: |
        | a     |  1.0 |
        | bcdef | 12.0 |
    """
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in (head, *rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) if padded else 0 for column in range(len(head))]

    def joined(cells: Sequence[str]) -> str:
        filled = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(filled)} |"

    rule = ["-" * max(3, width) for width in widths]
    for column in right:  # padded, the colon takes the place of a dash
        rule[column] = rule[column][padded:] + ":"
    return "\n".join([joined(lines[0]), joined(rule), *map(joined, lines[1:])])
