"""Analysis of the experts of a finished S2D run: divergence over training, each expert and their mean, barriers."""

import math
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..config.data import build_test_loader
from ..config.load import Config
from ..datasets import LabelledDataset
from ..datasets.selection import stratified_fraction
from ..errors import InputError
from ..evaluation.accuracy import ClassificationReport, evaluate
from ..s2d import merge_experts
from ..s2d.analysis import Barrier, barrier, contraction, expert_divergence, expert_model, predict_divergence
from ..s2d.ewa import expert_layers
from .checkpoint import load_checkpoint, load_model, require_sparse
from .folder import RunFolder
from .log import read_log
from .record import final_form, read_metrics
from .trained import open_trained

MOMENTUM = 0.9
"""beta1 of Adam and AdamW. It correlates the updates of neighbouring steps."""


def analyze_run(
    folder: str | Path,
    *,
    overrides: Sequence[str] = (),
    num_shapes: int = 500,
    num_positions: int = 5,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Analyse the sparse checkpoints of a run: the last one, and those that `train.keep_every` kept.

    Args:
        folder: the run folder.
        overrides: changes to the run's config, such as `data.root=...`.
        num_shapes: number of test shapes on which losses and accuracies are measured. Each class contributes the same
            share, at least one shape. At most all test shapes are used.
        num_positions: positions on the line between two models, both ends included; at least 3.
        device: where to compute.
        progress: show a progress bar on a terminal.

    Returns:
        Plain types for JSON; docs/why.md explains them. `epochs`: a row for each epoch of log.csv. `prediction`: how
        the predicted divergence was fitted. `checkpoints`: merged model, single experts, and barriers between experts.
        `between_checkpoints`: barriers between the merged models of neighbouring checkpoints, and between those of the
        first and the last checkpoint.

    Raises:
        InputError: the run is not an RUP-MoF run with at least two experts, or its data is missing.
    """
    if num_shapes < 1 or num_positions < 3:
        raise InputError(f"num_shapes is {num_shapes}, num_positions is {num_positions}; must be at least 1 and 3")
    run = RunFolder(folder)
    paths = _sparse_checkpoints(run)
    first = open_trained(next(iter(paths.values())), overrides)
    config, test = first.config, _part_of(first.dataset(), num_shapes)
    loader = build_test_loader(test, config.data, batch_size=config.eval.batch_size, seed=config.seed)
    num_experts = config.s2d.num_experts
    pairs = num_experts * (num_experts - 1) // 2
    lines = len(paths) - 1 + (len(paths) > 2)
    inner = num_positions - 2  # the ends of each line are measured once, beside it
    passes = len(paths) * (1 + num_experts + pairs * inner) + lines * inner
    checkpoints, merged = [], {}
    with tqdm(total=passes, desc="models evaluated", leave=False, disable=None if progress else True) as bar:

        def measure(model: nn.Module) -> ClassificationReport:
            bar.update()
            return evaluate(model, loader, device=device, progress=False)

        for epoch, path in paths.items():
            model = load_model(path).to(device)
            merged[epoch] = merge_experts(model)
            found = _experts_of(model, merged[epoch], measure, num_positions)
            checkpoints.append({"epoch": epoch, "file": path.name, **found})
        losses = {point["epoch"]: point["merged"]["loss"] for point in checkpoints}
        between = _between(merged, losses, measure, num_positions)
    epochs = _read_log(run.log)
    return {
        "run": str(run.root),
        "num_experts": num_experts,
        "num_shapes": len(test),
        "prediction": _predict_(epochs, config, model),
        "epochs": epochs,
        "checkpoints": checkpoints,
        "between_checkpoints": between,
        "final": _re_estimated(run),
    }


def _re_estimated(run: RunFolder) -> dict[str, Any] | None:
    """Return the saved model's accuracy and number of shapes, where BatchNorm statistics were re-estimated."""
    metrics = read_metrics(run.metrics)
    if not metrics or final_form(metrics) != "recalibrated":
        return None
    return {key: metrics["recalibrated"][key] for key in ("oa", "num_samples")}


def analysis_table(result: dict[str, Any]) -> str:
    """Return the analysis as text: a table of the checkpoints, then a table of the barriers between them."""
    lines = [
        f"{result['num_experts']} experts, measured on {result['num_shapes']} test shapes",
        "",
        "epoch  divergence  merged OA  experts OA          (range)        gap   barrier",
    ]
    for point in result["checkpoints"]:
        own = [100 * expert["oa"] for expert in point["experts"]]
        mean_divergence = sum(point["divergence"].values()) / len(point["divergence"])
        spread = f"({min(own):.2f} - {max(own):.2f})"
        lines.append(
            f"{point['epoch']:>5}  {mean_divergence:>10.3e}  {100 * point['merged']['oa']:>7.2f} %"
            f"  {sum(own) / len(own):>8.2f} %  {spread:>15}"
            f"  {point['gap']:>9.1e}  {point['highest_barrier']:>8.4f}"
        )
    lines += [
        "",
        "divergence: relative to the mean, over layers; gap: mean loss of the experts minus loss of the merged",
        "model, nats; barrier: the highest between two experts, nats",
    ]
    if final := result.get("final"):
        lines += [
            "merged OA is before BatchNorm statistics are re-estimated; the saved model has "
            f"{100 * final['oa']:.2f} % of {final['num_samples']} shapes",
        ]
    lines += [""]
    if result["between_checkpoints"]:
        lines += [f"{'from':>5}  {'to':>5}  {'barrier':>8}   between merged models"]
        lines += [
            f"{line['epochs'][0]:>5}  {line['epochs'][1]:>5}  {line['height']:>8.4f}"
            for line in result["between_checkpoints"]
        ]
    else:
        lines += ["only one checkpoint: train with train.keep_every=N to keep more of them"]
    if prediction := result["prediction"]:
        lines += [
            "",
            f"divergence of {prediction['fitted_epochs']} epochs: within a factor {prediction['typical_factor']:.2f} "
            f"of the prediction; its fitted constant is {prediction['relative_to_noise']:.2f} times that of pure noise",
        ]
    return "\n".join(lines)


def _sparse_checkpoints(run: RunFolder) -> dict[int, Path]:
    """Return the sparse checkpoints of a run by epoch, the last one included.

    Raises:
        InputError: there is no checkpoint, or the run is not an S2D run.
    """
    if not run.last.is_file():
        raise InputError(f"{run.last}: no such file; the folder of an S2D run is needed, as tools/train.py makes it")
    payload = load_checkpoint(run.last)
    require_sparse(payload, str(run.last))
    experts = payload["s2d"]
    if experts["kind"] != "rup" or experts["num_experts"] < 2:
        raise InputError(f"{run.root}: has no RUP-MoF of several experts (s2d.kind {experts['kind']})")
    paths = run.all_kept()
    paths.setdefault(payload["progress"]["epoch"], run.last)
    return dict(sorted(paths.items()))


def _part_of(dataset: LabelledDataset, num_shapes: int) -> LabelledDataset:
    if num_shapes >= len(dataset):
        return dataset
    return dataset.subset(stratified_fraction(dataset.labels, num_shapes / len(dataset), seed=0))


def _experts_of(
    model: nn.Module, mean: nn.Module, measure: Callable[[nn.Module], ClassificationReport], num_positions: int
) -> dict[str, Any]:
    alone = [expert_model(model, index) for index in range(expert_layers(model)[0].num_experts)]
    merged, experts = measure(mean), [measure(expert) for expert in alone]
    losses = [report.loss for report in experts]

    def between(i: int, j: int) -> dict[str, Any]:
        ends = (losses[i], losses[j])
        line = barrier(alone[i], alone[j], lambda m: measure(m).loss, num_positions=num_positions, ends=ends)
        return {"experts": [i, j], **_plain(line)}

    barriers = [between(i, j) for i, j in combinations(range(len(alone)), 2)]
    return {
        "divergence": expert_divergence(model),
        "merged": _short(merged),
        "experts": [_short(report) for report in experts],
        "gap": sum(report.loss for report in experts) / len(experts) - merged.loss,
        "barriers": barriers,
        "highest_barrier": max(line["height"] for line in barriers),
    }


def _between(
    merged: dict[int, nn.Module],
    losses: dict[int, float],
    measure: Callable[[nn.Module], ClassificationReport],
    num_positions: int,
) -> list[dict[str, Any]]:
    lines = list(pairwise(merged))
    if len(merged) > 2:
        lines.append((min(merged), max(merged)))

    def line(start: int, end: int) -> dict[str, Any]:
        ends = (losses[start], losses[end])
        found = barrier(merged[start], merged[end], lambda m: measure(m).loss, num_positions=num_positions, ends=ends)
        return {"epochs": [start, end], **_plain(found)}

    return [line(start, end) for start, end in lines]


def _read_log(path: Path) -> list[dict[str, float]]:
    """Read the columns of log.csv that the analysis needs."""
    wanted = ("epoch", "updates", "lr", "share_rate", "divergence")
    rows = read_log(path) if path.is_file() else []
    return [{key: row[key] for key in wanted if key in row} for row in rows]


def _predict_(epochs: list[dict[str, float]], config: Config, model: nn.Module) -> dict[str, float] | None:
    """Add `contraction` and `predicted` divergence to the rows of the log; return how the prediction was fitted.

    The spread of the experts' updates is assumed to be proportional to the learning rate. Only the factor of
    proportionality is fitted; the shape of the curve is not. If the log has the divergence of fewer than two epochs,
    nothing is predicted.
    """
    num_experts = config.s2d.num_experts
    for row in epochs:
        row["contraction"] = contraction(row["share_rate"], num_experts)
    if not epochs or config.s2d.init != "copy" or config.s2d.init_noise:
        return None
    updates = [0.0, *(row["updates"] for row in epochs)]
    steps = np.arange(1, int(updates[-1]) + 1)
    start_lr = config.optim.warmup_lr if config.optim.warmup_epochs else config.optim.lr
    start_rate = config.s2d.share_rate if config.s2d.schedule == "constant" else 0.0
    rates = np.interp(steps, updates, [start_lr, *(row["lr"] for row in epochs)]).tolist()
    shares = np.interp(steps, updates, [start_rate, *(row["share_rate"] for row in epochs)]).tolist()
    unit = predict_divergence(rates, shares, num_experts, correlation=MOMENTUM)
    at_end = [unit[int(row["updates"]) - 1] for row in epochs]
    pairs = [(row["divergence"], own) for row, own in zip(epochs, at_end) if row.get("divergence") and own > 0]
    if len(pairs) < 2:  # one number is met exactly by one fitted factor
        return None
    logs = [math.log(measured / own) for measured, own in pairs]
    mean = sum(logs) / len(logs)
    for row, own in zip(epochs, at_end):
        row["predicted"] = math.exp(mean) * own
    return {
        "momentum": MOMENTUM,
        "spread_per_lr": math.exp(mean),
        "relative_to_noise": math.exp(mean) / _noise_spread(model),
        "typical_factor": math.exp(math.sqrt(sum((value - mean) ** 2 for value in logs) / len(logs))),
        "fitted_epochs": len(pairs),
    }


def _noise_spread(model: nn.Module) -> float:
    """Return the spread of Adam's updates per unit of learning rate, if each expert's gradients were pure noise.

    The steps then have a root mean square of sqrt((1 - beta1) / (1 + beta1)) times the learning rate. The fraction
    (K - 1) / K of their square is variance around the experts' mean. The result is relative to the size of the weights,
    like `expert_divergence`.
    """
    step = math.sqrt((1 - MOMENTUM) / (1 + MOMENTUM))
    relative = []
    for layer in expert_layers(model):
        means = torch.cat([parameter.detach().mean(0).flatten() for parameter in layer.expert_parameters()])
        relative.append(math.sqrt(1 - 1 / layer.num_experts) * step / float(means.square().mean().sqrt()))
    return sum(relative) / len(relative)


def _plain(line: Barrier) -> dict[str, Any]:
    return {"positions": list(line.positions), "losses": list(line.losses), "height": line.height}


def _short(report: ClassificationReport) -> dict[str, float]:
    return {"oa": report.oa, "macc": report.macc, "loss": report.loss}
