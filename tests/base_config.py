"""The smallest config, as a mapping, and the same with one other value."""

import copy

BASE = {
    "output_dir": "runs/test",
    "data": {"name": "modelnet40", "root": "data/modelnet40"},
    "model": {"name": "point_bert_tiny"},
}


def changed(path: str, value: object) -> dict:
    mapping = copy.deepcopy(BASE)
    *sections, key = path.split(".")
    place = mapping
    for section in sections:
        place = place.setdefault(section, {})
    place[key] = value
    return mapping
