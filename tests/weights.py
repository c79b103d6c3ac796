"""What two runs left, to be compared bit for bit: weights and logs."""

import csv
import os
from collections.abc import Mapping

import torch

from s2d3d import load_checkpoint


def assert_same_weights(first, second):
    """Compare two state dicts, or those of two checkpoint files; the message names the tensor that differs."""
    first, second = (
        weights if isinstance(weights, Mapping) else load_checkpoint(os.fspath(weights))["state_dict"]
        for weights in (first, second)
    )
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


def weights(path):
    """Return the weights of a checkpoint."""
    return load_checkpoint(path)["state_dict"]


def log_rows(folder):
    """Return the log of a run without what time does to it."""
    with open(folder.log) as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]
