"""The reference modules of the tests, loaded by path, and models of ours with their weights."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from s2d3d.models import create_model

from .interleave import Skip

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "reference"
CLASSES = {"point_bert": "PointBERT", "point_mae": "PointMAE", "point_transformer": "PointTransformer"}
NAME = "s2d3d_reference"


def load_reference(folder: Path = FOLDER) -> ModuleType:
    """Import `tests/reference` of the repository.

    Raises:
        Skip: this is not a clone of the repository.
    """
    if not (folder / "__init__.py").is_file():
        raise Skip(f"{folder.parent.name}/{folder.name} is missing: the baselines need a clone of the repository")
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None  # as for every file with Python's ending
        module = importlib.util.module_from_spec(spec)
        sys.modules[NAME] = module
        spec.loader.exec_module(module)
    return sys.modules[NAME]


def submodule(package: ModuleType, name: str) -> ModuleType:
    """Import a module of the reference package."""
    return importlib.import_module(f"{package.__name__}.{name}")


def reference_model(name: str, num_classes: int, kwargs: dict[str, Any], seed: int) -> nn.Module:
    """Build the reference module of one of our models, with seeded weights like those of a trained model.

    Raises:
        Skip: there is none.
    """
    package = load_reference()
    if name not in CLASSES:
        raise Skip(f"there is no reference module of {name}")
    module = submodule(package, name)
    return package.draw_weights_(getattr(module, CLASSES[name])(num_classes, **kwargs), seed)


def our_model(name: str, num_classes: int, kwargs: dict[str, Any], seed: int) -> nn.Module:
    """Build one of our models with the weights of its reference module if it has one, else with random weights.

    `draw_weights_` depends only on names and shapes of tensors, which are those of the reference.
    """
    torch.manual_seed(seed)  # for what is drawn without a reference
    model = create_model(name, num_classes=num_classes, **kwargs)
    try:
        package = load_reference()
    except Skip:
        return model
    return package.draw_weights_(model, seed)
