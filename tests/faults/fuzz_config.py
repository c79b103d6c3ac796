"""Fuzzing of YAML configs and of `section.key=value` overrides."""

import copy
import random
from pathlib import Path

import yaml

from faults.damage import damage
from faults.fuzz import Outcome, accepted, refused
from faults.values import leaf, paths, pick, remove_at, replace_at, tree
from s2d3d import load_config
from s2d3d.config.load import dump_config
from s2d3d.errors import InputError

TAILS = (
    b"a: &x [1]\nb: *x\n", b"a: !!python/object/apply:os.system ['touch executed']\n", b"<<: {seed: 3}\n",
    b"seed: 1\nseed: 2\n", b"? [a, b]\n: c\n", b"\t- x\n", b"---\nseed: 0\n", b"%YAML 9.9\n---\n", b"key: |\n  text\n",
    b"data: {name: shapes\n", b"\x00", b"\xff\xfe", b"a: !!binary aGVsbG8=\n", b"a: !!set {b, c}\n",
    b"a: 2001-12-14t21:59:43.10-05:00\n", b"'open\n", b"a: @b\n", b"a: `b`\n",
)  # fmt: skip


class ConfigCases:
    """Mutated and hostile config files, and overrides of a good one."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.path, self.base = folder / "config.yaml", base
        self.mapping = yaml.safe_load(base.read_text())
        self.defaults = load_config(base).to_dict()
        self.known = [path for path in paths(self.defaults) if all(isinstance(key, str) for key in path)]

    def yaml(self, rng: random.Random) -> Outcome:
        """Read one config file."""
        self.path.write_bytes(self._content(rng))
        return self._read(self.path, ())

    def override(self, rng: random.Random) -> Outcome:
        """Apply one to four overrides to the base config."""
        return self._read(self.base, [self._override(rng) for _ in range(rng.choice([1, 1, 2, 4]))])

    def _read(self, path: Path, overrides: object) -> Outcome:
        what = path.read_bytes()[:3000] if not overrides else repr(overrides)[:3000]
        try:
            config = load_config(path, overrides)
        except InputError as error:
            starts = (str(path), "override ") if overrides else (str(path),)
            return refused(str(error), starts, what)
        self.path.write_text(dump_config(config), encoding="utf-8")
        same = load_config(self.path) == config
        return accepted(same, "what is written is not what was read", what)

    def _content(self, rng: random.Random) -> bytes:
        kind = rng.randrange(10)
        if kind == 0:
            return rng.randbytes(rng.randrange(400))
        if kind == 1:
            return yaml.safe_dump(_plain(tree(rng, 5)), allow_unicode=True).encode(errors="surrogatepass")
        if kind == 2:
            nested = rng.choice([b"[", b"{a: ", b"- ", b"a:\n "])
            return nested * rng.choice([5, 30, 3000, 90_000])
        mapping = copy.deepcopy(self.mapping)
        for _ in range(rng.choice([1, 1, 2, 4])):
            pick(rng, [self._set, self._set, self._add, self._remove])(mapping, rng)
        text = yaml.safe_dump(_plain(mapping), allow_unicode=rng.random() < 0.5).encode(errors="surrogatepass")
        if kind == 3:
            text += rng.choice(TAILS)
        if kind == 4:
            text = rng.choice(TAILS) + text
        if kind in (5, 6):
            text = damage(text, rng)
        return text

    def _set(self, mapping: dict, rng: random.Random) -> None:
        place = rng.choice(self.known)
        section = mapping
        for key in place[:-1]:
            if not isinstance(section.get(key), dict):
                section[key] = {}
            section = section[key]
        section[place[-1]] = tree(rng) if rng.random() < 0.5 else self._likely(place, rng)

    def _likely(self, place: tuple, rng: random.Random) -> object:
        """Draw a value of the kind that belongs at a place."""
        value = self.defaults
        for key in place:
            value = value[key]
        if isinstance(value, bool):
            return rng.random() < 0.5
        if isinstance(value, int):
            return rng.randint(0, 2 * value + 3)
        return rng.random() * rng.choice([1, 3, 100]) if isinstance(value, float) else value

    def _add(self, mapping: dict, rng: random.Random) -> None:
        places = [place for place in paths(mapping) if isinstance(place[-1], str)]
        place = rng.choice(places) if places else (0,)
        replace_at(mapping, (*place[:-1], str(leaf(rng))), tree(rng))

    def _remove(self, mapping: dict, rng: random.Random) -> None:
        places = paths(mapping)
        if places:
            remove_at(mapping, rng.choice(places))

    def _override(self, rng: random.Random) -> str:
        kind = rng.randrange(10)
        if kind == 0:
            return rng.randbytes(rng.randrange(20)).decode("latin1")
        place = rng.choice(self.known)
        key = ".".join(place)
        if kind > 4:
            return f"{key}={yaml.safe_dump(_plain(self._likely(place, rng)), default_flow_style=True).strip()}"
        if kind == 1:
            key = damage(key.encode(), rng).decode("latin1")
        if kind == 2:
            key += "." + str(leaf(rng))
        value = str(tree(rng)) if kind < 4 else yaml.safe_dump(_plain(tree(rng)), default_flow_style=True).strip()
        return f"{key}{rng.choice(['=', '=', '=', '=', '', '==', ' = '])}{value}"


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
