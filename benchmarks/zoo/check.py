"""One row of the compatibility page: convert a tiny model and compare it with the dense one."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from benchmarks.training_pass import outputs_of, pass_error, relative, run_model
from s2d3d.s2d import MoFConfig, convert_to_mof_, merge_experts
from s2d3d.s2d.ewa import expert_layers
from s2d3d.s2d.trial import first_line, pinned

from .family import Family, quieten_

TOLERANCE = 1e-4
"""Relative. Models run in float64; what some cast to float32 inside is rounded. Faults are above 1e-2."""
BATCHES = (4, 5)
"""As many samples as experts, and a number that they do not divide."""


@dataclass
class Row:
    """What happened to a family.

    Attributes:
        source: of the family.
        name: of the family.
        targets: the pattern, or "default".
        status: "exact", "refused", "no FFN found", "wrong" or "not built".
        reason: of the status, where it is none of the first.
        num_ffns: how many were converted.
        training_error: relative, of outputs, gradients and statistics in the training pass, identical experts.
        merge_error: relative, of the output in evaluation, experts moved apart, merged model.
        strict: whether the merged state dict loads into a new dense model.
    """

    source: str
    name: str
    targets: str
    status: str = ""
    reason: str = ""
    num_ffns: int = 0
    training_error: float | None = None
    merge_error: float | None = None
    strict: bool | None = None

    def line(self) -> str:
        """Return the row as one line of text."""
        errors = [value for value in (self.training_error, self.merge_error) if value is not None]
        numbers = "".join(f" {value:.0e}" for value in errors)
        return f"{self.source}:{self.name} {self.num_ffns} {self.status}{numbers} {self.reason}".rstrip()


def examine(family: Family) -> Row:
    """Convert a family, compare it with its dense model, merge it, and load the result into a new dense model."""
    row = Row(family.source, family.name, ", ".join(family.targets or ("default",)))
    try:
        dense, inputs = _runnable(family)
    except Exception as error:
        row.status, row.reason = "not built", first_line(error)
        return row
    config = MoFConfig(num_experts=4, every=1, targets=family.targets)
    sparse = copy.deepcopy(dense)
    try:
        try:
            row.num_ffns = len(convert_to_mof_(sparse, config))
        except TypeError as error:
            if "example=" not in str(error):
                raise
            row.num_ffns = len(convert_to_mof_(sparse, config, example=inputs[0]))
            row.targets += ", with example="
    except (TypeError, ValueError) as error:
        row.status = "no FFN found" if "has no FFN" in str(error) else "refused"
        row.reason = str(error)
        return row
    try:
        row.training_error = pass_error(dense, sparse, inputs, run=_run_pinned)
        row.merge_error, row.strict = _merged(family, sparse, inputs[-1])
    except Exception as error:
        row.status, row.reason = "wrong", first_line(error)
        return row
    worst = max(row.training_error, row.merge_error)
    right = math.isfinite(worst) and worst < TOLERANCE and row.strict
    row.status = "exact" if right else "wrong"
    return row


def _run_pinned(model: nn.Module, x: Any) -> Any:
    """Run with the same random numbers in both models, which noise in the training pass needs (GroupViT)."""
    with pinned():
        return run_model(model, x)


def _runnable(family: Family) -> tuple[nn.Module, list[Any]]:
    """Build a model and inputs in float64, or in float32 where it does not run in that."""
    inputs = [family.inputs(batch) for batch in BATCHES]
    wide = tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, inputs)
    try:
        return _run(_built(family).double(), wide), wide
    except Exception:
        return _run(_built(family), inputs), inputs


@torch.no_grad()
def _run(model: nn.Module, inputs: list[Any]) -> nn.Module:
    trial = copy.deepcopy(model).train()
    for x in inputs:
        run_model(trial, x)
    return model.train()


@torch.no_grad()
def _built(family: Family) -> nn.Module:
    """Build a model, with noise on all weights: a branch that starts at zero, or scaled by 1e-5, hides its faults."""
    torch.manual_seed(0)
    model = quieten_(family.build())
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel():
            scale = 0.2 if parameter.dim() < 2 else 0.5 * parameter[0].numel() ** -0.5
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model


@torch.no_grad()
def _merged(family: Family, sparse: nn.Module, x: Any) -> tuple[float, bool]:
    for layer in expert_layers(sparse):
        for parameter in layer.expert_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    wanted = outputs_of(run_model(sparse.eval(), x))
    state = merge_experts(sparse).state_dict()
    fresh = _built(family).to(next(sparse.parameters()).dtype).eval()
    try:
        fresh.load_state_dict(state, strict=True)
    except RuntimeError:
        return float("inf"), False
    found = outputs_of(run_model(fresh, x))
    return max(relative(ours, theirs) for ours, theirs in zip(found, wanted, strict=True)), True
