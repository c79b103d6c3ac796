"""The training state that a checkpoint holds: gathered from all ranks, and checked against the run that continues it.

Optimizers, generators and fused kernels trust their state: one of another shape ends the process or overwrites memory.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import InputError, printable
from ..machine import Runtime
from ..random_state import rng_state
from .checkpoint import check_weights
from .log import COLUMNS
from .resume import Progress, selection_score

_NUMBERS = (int, float)


def gather_states(runtime: Runtime, sums: Tensor) -> tuple[list[Any], list[Tensor]]:
    """Return the random state (see `rng_state`) and the `sums` of every rank; all `sums` have the same shape."""
    own = rng_state(runtime.device)
    if not runtime.is_distributed:
        return [own], [sums]
    states: list[Any] = [None] * runtime.world_size
    dist.all_gather_object(states, own)
    all_sums = [torch.zeros_like(sums) for _ in states]
    dist.all_gather(all_sums, sums)
    return states, all_sums


def checked_progress(
    state: Mapping[str, Any], where: str, *, epochs: int, task: str = "classify"
) -> tuple[Progress, list[dict[str, Any]]]:
    """Return the progress and the rows of the log that a checkpoint holds.

    Args:
        state: of the checkpoint.
        where: its file, for errors.
        epochs: of the run.
        task: of the run.

    Raises:
        InputError: they cannot be what s2d3d wrote.
    """
    found = _mapping(state, "progress", where)
    for key, most in {"epoch": epochs, "step": 2**53, "updates": 2**53}.items():
        value = found.get(key)
        _require(type(value) is int and 0 <= value <= most, where, f"progress.{key}", value, f"in [0, {most}]")
    seconds: Any = found.get("seconds")
    best = found.get("best")
    _require(_is_finite(seconds) and seconds >= 0, where, "progress.seconds", seconds, "a finite number of at least 0")
    _require(best is None or _is_finite(best), where, "progress.best", best, "a finite number or None")
    epoch, rows = found["epoch"], state.get("history")
    fits = isinstance(rows, list) and len(rows) == epoch
    _require(fits, where, "history", rows, f"a list of {epoch} rows, one for each epoch")
    assert isinstance(rows, list)
    for number, row in enumerate(rows, 1):
        entry = f"history[{number - 1}]"
        _require(type(row) is dict, where, entry, row, "a row of the log")
        wrong = [key for key in row if key not in COLUMNS[task]]
        _require(not wrong, where, entry, row, f"with the columns {', '.join(COLUMNS[task])} alone")
        for key in ("epoch", "updates", "seconds", "train_loss", *row):
            _require(_is_finite(row.get(key)), where, f"{entry}.{key}", row.get(key), "a finite number")
        _require(row["epoch"] == number, where, f"{entry}.epoch", row["epoch"], str(number))
    # Older files lack it; the first epoch of a tie was the best one then as well.
    chosen = found.get("best_epoch", next((row["epoch"] for row in rows if selection_score(row) == best), 0))
    known = type(chosen) is int and 0 <= chosen <= epoch
    _require(known, where, "progress.best_epoch", chosen, f"in [0, {epoch}]")
    return Progress(epoch, found["step"], found["updates"], seconds, best, chosen), [dict(row) for row in rows]


def checked_state(
    state: Mapping[str, Any],
    where: str,
    updates: int,
    *,
    optimizer: torch.optim.Optimizer,
    ewa: bool,
    ema: nn.Module | None,
    sums: Tensor,
    device: torch.device,
    ranks: int,
) -> dict[str, Any]:
    """Return what the parts of a run continue from, by the keys of the checkpoint; None for parts that it lacks.

    Args:
        state: of the checkpoint.
        where: its file, for errors.
        updates: that it has made.
        optimizer: of the run that continues, before its first step.
        ewa: whether it averages experts.
        ema: its average of the weights.
        sums: over its epoch, of one rank.
        device: of this rank.
        ranks: processes.

    Raises:
        InputError: a part cannot be what s2d3d wrote for this run; names file and entry.
    """
    return {
        "sums": checked_sums(state, where, sums, ranks),
        "rng": checked_rng(state, where, device, ranks),
        "optimizer": checked_optimizer(state, where, optimizer, updates),
        "ewa": checked_ewa(state, where, updates) if ewa else None,
        "ema": checked_ema(state, where, ema) if ema else None,
    }


def checked_sums(state: Mapping[str, Any], where: str, sums: Tensor, ranks: int) -> list[Tensor]:
    """Return the sums over the epoch of every rank; each is like `sums`.

    Raises:
        InputError: they cannot be what s2d3d wrote.
    """
    found = state.get("sums")
    _require(isinstance(found, list) and len(found) == ranks, where, "sums", found, f"a list of {ranks} tensors")
    assert isinstance(found, list)
    return [_tensor(value, where, f"sums[{rank}]", sums.shape, sums.dtype) for rank, value in enumerate(found)]


def checked_rng(state: Mapping[str, Any], where: str, device: torch.device, ranks: int) -> list[dict[str, Any]]:
    """Return the random states of every rank, as `set_rng_state` takes them.

    Raises:
        InputError: they cannot be what s2d3d wrote.
    """
    found = state.get("rng")
    _require(isinstance(found, list) and len(found) == ranks, where, "rng", found, f"a list of {ranks} states")
    assert isinstance(found, list)
    own = rng_state(device)
    for rank, value in enumerate(found):
        entry = f"rng[{rank}]"
        _require(isinstance(value, dict), where, entry, value, "the states of the generators")
        _check_python(value.get("python"), where, f"{entry}.python")
        _check_numpy(value.get("numpy"), where, f"{entry}.numpy")
        for key in ("torch", "cuda"):
            if key == "torch" or (key in own and key in value):
                reference = own[key]
                assert isinstance(reference, Tensor)
                value[key] = _tensor(value.get(key), where, f"{entry}.{key}", reference.shape, reference.dtype)
    return found


def checked_optimizer(
    state: Mapping[str, Any], where: str, optimizer: torch.optim.Optimizer, updates: int
) -> dict[str, Any]:
    """Return the optimizer's state, as its `load_state_dict` takes it: options of this run, moments of the file.

    What an optimizer keeps of a parameter is found out by a step of a copy. Options of the file must be those of the
    config; they are compared and not used, except the learning rate.

    Args:
        state: of the checkpoint.
        where: its file, for errors.
        optimizer: of the run that continues, before its first step.
        updates: that the checkpoint has made.

    Raises:
        InputError: it cannot be of this optimizer and model.
    """
    found, fresh = _mapping(state, "optimizer", where), optimizer.state_dict()
    groups, own_groups = found.get("param_groups"), fresh["param_groups"]
    fits = isinstance(groups, list) and len(groups) == len(own_groups)
    _require(fits, where, "optimizer.param_groups", groups, f"a list of {len(own_groups)} groups")
    assert isinstance(groups, list)
    references, groups_after = _state_after_a_step(optimizer)
    merged = []
    for number, (theirs, ours, after) in enumerate(zip(groups, own_groups, groups_after)):
        entry = f"optimizer.param_groups[{number}]"
        _require(isinstance(theirs, dict), where, entry, theirs, "a group of parameters")
        counters = {key for key in after if key not in ours or ours[key] != after[key]}
        for key in after:
            value = theirs.get(key)
            if key in counters:
                same = type(value) is type(after[key]) and (not isinstance(value, _NUMBERS) or _is_finite(value))
                _require(same, where, f"{entry}.{key}", value, f"of type {type(after[key]).__name__}")
            elif key != "lr" and (key in theirs or key == "params"):
                same = type(value) is type(ours[key]) and not isinstance(value, Tensor) and value == ours[key]
                _require(same, where, f"{entry}.{key}", value, repr(ours[key]) if key != "params" else "of this model")
        rate = theirs.get("lr")
        _require(_is_finite(rate) and rate >= 0, where, f"{entry}.lr", rate, "a finite number of at least 0")
        merged.append(ours | {"lr": rate} | {key: theirs[key] for key in counters})
    kept = found.get("state")
    _require(isinstance(kept, dict), where, "optimizer.state", kept, "a state for each parameter")
    assert isinstance(kept, dict)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if updates:
        _require(bool(kept) or not references, where, "optimizer.state", kept, "a state for each parameter")
    clean = {}
    for index, entries in kept.items():
        known = type(index) is int and 0 <= index < len(parameters) and isinstance(entries, dict)
        _require(known, where, "optimizer.state", index, f"by numbers of the {len(parameters)} parameters")
        reference = references.get(index, {})
        lacking = [key for key in reference if key not in entries]
        _require(not lacking, where, f"optimizer.state[{index}]", list(entries), f"with {', '.join(lacking)}")
        clean[index] = {
            key: _checked_moment(value, reference.get(key), parameters[index], where, f"optimizer.state[{index}].{key}")
            for key, value in entries.items()
        }
        step = clean[index].get("step")
        if step is not None:
            _require(0 <= float(step) <= updates, where, f"optimizer.state[{index}].step", step, f"in [0, {updates}]")
    # Kron keeps a generator of random numbers.
    own = {key: found.get(key) for key in fresh if key not in ("state", "param_groups")}
    for key, value in own.items():
        same = type(value) is type(fresh[key]) and getattr(value, "shape", 0) == getattr(fresh[key], "shape", 0)
        _require(same, where, f"optimizer.{key}", value, f"of type {type(fresh[key]).__name__}")
    return {"state": clean, "param_groups": merged, **own}


def checked_ewa(state: Mapping[str, Any], where: str, updates: int) -> dict[str, int]:
    """Return the position of EWA in its schedule, which takes a step with each of the `updates`.

    Raises:
        InputError: it cannot be what s2d3d wrote.
    """
    steps = _mapping(state, "ewa", where).get("num_steps")
    _require(type(steps) is int and steps == updates, where, "ewa.num_steps", steps, str(updates))
    return {"num_steps": updates}


def checked_ema(state: Mapping[str, Any], where: str, ema: nn.Module) -> dict[str, Tensor]:
    """Return the averaged weights.

    Raises:
        InputError: they are not of this model.
    """
    found, own = _mapping(state, "ema", where), ema.state_dict()
    for key, value in found.items():
        _require(isinstance(key, str) and isinstance(value, Tensor), where, "ema", key, "weights by name")
    check_weights(ema, dict(found), where=f"{where}: ema")
    return {key: _tensor(found[key], where, f"ema.{key}", weight.shape, weight.dtype) for key, weight in own.items()}


def _state_after_a_step(optimizer: torch.optim.Optimizer) -> tuple[dict[int, dict[str, Any]], list[dict[str, Any]]]:
    """Return the states and groups of a copy of a fresh optimizer after a step; the original is untouched."""
    probe = copy.deepcopy(optimizer)
    for group in probe.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 1e-3)
    probe.step()
    state = probe.state_dict()
    return state["state"], state["param_groups"]


def _checked_moment(value: Any, reference: Any, parameter: Tensor, where: str, entry: str) -> Any:
    if isinstance(reference, Tensor):
        return _tensor(value, where, entry, reference.shape, reference.dtype)
    if isinstance(reference, (list, tuple)):
        fits = type(value) is type(reference) and len(value) == len(reference)
        _require(fits, where, entry, value, f"a {type(reference).__name__} of {len(reference)}")
        parts = [
            _checked_moment(part, own, parameter, where, f"{entry}[{number}]")
            for number, (part, own) in enumerate(zip(value, reference))
        ]
        return type(reference)(parts)
    if reference is not None:
        same = type(value) is type(reference) and (_is_finite(value) or value == reference)
        _require(same, where, entry, value, f"a finite number, as {reference!r}")
        return value
    # Some optimizers keep more after later steps: of the shape of the parameter, or one number.
    if isinstance(value, Tensor):
        return _tensor(value, where, entry, parameter.shape if value.dim() else value.shape, None)
    _require(value is None or _is_finite(value), where, entry, value, "a tensor, a finite number or None")
    return value


def _tensor(value: Any, where: str, entry: str, shape: Sequence[int], dtype: torch.dtype | None) -> Tensor:
    """Return a copy with memory of its own: the file may hold views that share theirs."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta and not value.is_quantized
    fits = plain and tuple(value.shape) == tuple(shape) and dtype in (None, value.dtype) and not value.is_complex()
    kind = f"a {str(dtype or 'number').removeprefix('torch.')} tensor of shape {tuple(shape)}"
    _require(fits, where, entry, value, kind)
    _require(bool(value.isfinite().all()), where, entry, value, "finite")
    return value.detach().clone()


def _check_python(value: Any, where: str, entry: str) -> None:
    fits = isinstance(value, (tuple, list)) and len(value) == 3 and value[0] == 3
    words = value[1] if fits and isinstance(value[1], (tuple, list)) and len(value[1]) == 625 else ()
    whole = bool(words) and all(type(word) is int and 0 <= word < 2**32 for word in words) and 0 <= words[-1] <= 624
    fits = whole and (value[2] is None or _is_finite(value[2]))
    _require(fits, where, entry, value, "a state of Python's generator")


def _check_numpy(value: Any, where: str, entry: str) -> None:
    fits = isinstance(value, (tuple, list)) and len(value) == 5 and value[0] == np.random.MT19937.__name__
    words = value[1] if fits and isinstance(value[1], list) and len(value[1]) == 624 else ()
    whole = bool(words) and all(type(word) is int and 0 <= word < 2**32 for word in words)
    place = whole and type(value[2]) is int and 0 <= value[2] <= 624 and value[3] in (0, 1)
    _require(bool(place) and _is_finite(value[4]), where, entry, value, "a state of NumPy's generator")


def _mapping(state: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = state.get(key)
    _require(isinstance(value, dict), where, key, value, "a dictionary")
    assert isinstance(value, dict)
    return value


def _is_finite(value: Any) -> bool:
    return type(value) in _NUMBERS and abs(value) < 1e300 and math.isfinite(value)


def _require(fits: bool, where: str, entry: str, value: Any, expected: str) -> None:
    if not fits:
        raise InputError(
            f"{where}: {printable(entry)[:80]} is {_shown(value)}, must be {expected}; "
            "its training state cannot be what s2d3d wrote, resume from another checkpoint"
        )


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if isinstance(value, (dict, list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 64:
        return "a number of more than 64 bits"
    text = printable(repr(value))
    return text if len(text) <= 40 else f"{text[:40]}..."
