"""Ways to damage bytes, each a function of a seed."""

import random
from collections.abc import Callable


def flip_bits(content: bytes, count: int, seed: int) -> bytes:
    """Flip `count` random bits."""
    rng, changed = random.Random(seed), bytearray(content)
    for _ in range(count):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    """Keep the beginning."""
    return content[: rng.randrange(len(content))]


def flip(content: bytes, rng: random.Random) -> bytes:
    """Flip 1 to 8 bits."""
    return flip_bits(content, rng.randint(1, 8), rng.getrandbits(32))


def overwrite(content: bytes, rng: random.Random) -> bytes:
    """Replace a run of bytes by random, zero or 0xff bytes."""
    start, length = rng.randrange(len(content)), rng.randint(1, 64)
    filling = rng.choice([rng.randbytes(length), bytes(length), b"\xff" * length])
    return content[:start] + filling + content[start + length :]


def splice(content: bytes, rng: random.Random) -> bytes:
    """Copy a run of bytes to another place."""
    start, target, length = rng.randrange(len(content)), rng.randrange(len(content)), rng.randint(1, 512)
    return content[:target] + content[start : start + length] + content[target + length :]


def insert(content: bytes, rng: random.Random) -> bytes:
    """Insert random bytes."""
    place = rng.randrange(len(content))
    return content[:place] + rng.randbytes(rng.randint(1, 64)) + content[place:]


def drop(content: bytes, rng: random.Random) -> bytes:
    """Leave out a run of bytes."""
    place = rng.randrange(len(content))
    return content[:place] + content[place + rng.randint(1, 64) :]


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (cut, flip, flip, flip, overwrite, splice, insert, drop)
"""Flipped bits, the likeliest damage, come more often."""


def damage(content: bytes, rng: random.Random) -> bytes:
    """Damage bytes in one to three ways."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        content = rng.choice(DAMAGES)(content or b"\0", rng)
    return content
