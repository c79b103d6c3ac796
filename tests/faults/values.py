"""Values and texts that programs stumble over, drawn from a `random.Random`."""

import random
from collections.abc import Callable, Sequence
from typing import Any

TEXTS = (
    "", " ", "~", "null", "yes", "NO", "5e-4", "1_000", "0o17", "0x1F", "1:30", "2020-01-01", ".inf", "-.inf", ".nan",
    "1e999", "x" * 2000, "\n", "a\nb", "\t", "\x00", "\x1b[31m", "\ufeff", "\ud7ff", "é", "點雲", "😀",
    "../../etc/passwd", "/etc/passwd", "/dev/zero", "/proc/self/mem", "-", "--", "=", "a=b", "%s%n", "{0}", "${HOME}",
    "*", "&a", "!!python/name:os.system", "point_bert", "point_bert_tiny", "shapes", "modelnet40", "rup", "cpu",
    "cuda:99", "adamw", "__class__", "[1, 2", "{",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 16, 255, 10**4, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 10**40, -(10**40), 0.0, -0.0, 0.5,
    1.0, 1.5, -1.5, 1e-300, 1e300, 5e-324, float("inf"), float("-inf"), float("nan"), True, False,
)  # fmt: skip


def leaf(rng: random.Random) -> Any:
    """Draw a scalar."""
    return rng.choice([None, rng.choice(TEXTS), rng.choice(NUMBERS), rng.randint(-5, 50), rng.random()])


def tree(rng: random.Random, depth: int = 3) -> Any:
    """Draw a scalar, a list or a mapping."""
    kind = rng.randrange(6)
    if depth == 0 or kind < 3:
        return leaf(rng)
    size = rng.choice([0, 1, 2, 3, 5])
    if kind == 3:
        return [tree(rng, depth - 1) for _ in range(size)]
    if kind == 4:
        return {str(leaf(rng)): tree(rng, depth - 1) for _ in range(size)}
    return tuple(leaf(rng) for _ in range(size))


def pick(rng: random.Random, choices: Sequence[Callable]) -> Callable:
    """Draw one of some functions."""
    return choices[rng.randrange(len(choices))]


def paths(mapping: Any, prefix: tuple = ()) -> list[tuple]:
    """List the places of a nested structure of dicts and lists, inner ones included."""
    found = [prefix] if prefix else []
    items = mapping.items() if isinstance(mapping, dict) else enumerate(mapping) if isinstance(mapping, list) else ()
    for key, value in items:
        found += paths(value, (*prefix, key))
    return found


def replace_at(structure: Any, place: tuple, value: Any) -> None:
    """Set what lies at a place, in place."""
    for key in place[:-1]:
        structure = structure[key]
    structure[place[-1]] = value


def remove_at(structure: Any, place: tuple) -> None:
    """Remove what lies at a place, in place."""
    for key in place[:-1]:
        structure = structure[key]
    del structure[place[-1]]
