"""The end of a run: the final model, and the evaluations of its forms."""

import copy
from collections.abc import Mapping

from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..config.load import Config
from ..datasets import PointCloudDataset
from ..evaluation.accuracy import ClassificationReport
from ..evaluation.batchnorm import norms_behind_experts, recalibrate_batchnorm_, unsettled_norms
from ..evaluation.reconstruction import Report
from ..machine import Runtime
from ..s2d import merge_experts
from .loaders import Loaders
from .parts import ModelParts
from .task import Classification, Task


def end_model(
    config: Config,
    runtime: Runtime,
    data: Loaders,
    parts: ModelParts,
    task: Task,
    ema: ModelEmaV3 | None,
    updates: int,
) -> tuple[nn.Module, dict[str, Report], str, Tensor | None]:
    """Merge the trained model, re-estimate its BatchNorm statistics if the config says so, and evaluate each form.

    Re-estimated are the layers behind experts, and all layers that `updates` were too few for, see `unsettled_norms`.
    A model whose experts have a router is not merged. It is evaluated with its experts.

    Returns:
        The final model, a copy; the evaluations by form of the model; the form of the final model; its logits (n, C)
        for the scored clouds, None if it has no classes.
    """
    final = copy.deepcopy if parts.routed else merge_experts
    model, scored, kept = final(parts.model), data.scored, "routed" if parts.routed else "merged"
    reports: dict[str, Report] = {}
    if parts.converted and not parts.routed:
        reports["sparse"] = task.evaluate(parts.model, scored)
    reports[kept], logits = task.score(model, scored)
    if ema:
        reports["ema"] = task.evaluate(final(ema.module), scored)
    if config.eval.recalibrate_batchnorm:
        norms = norms_behind_experts(model, config, parts.converted, parts.mof)
        norms += [norm for norm in unsettled_norms(model, updates) if norm not in norms]
        held = {layer for name in parts.frozen for layer in model.get_submodule(name).modules()}
        norms = [norm for norm in norms if norm not in held]
        if recalibrate_batchnorm_(model, data.plain_train, device=runtime.device, layers=norms):
            kept = "recalibrated"
            reports[kept], logits = task.score(model, scored)
    if config.eval.votes > 1:
        reports["voting"] = task.evaluate(model, scored, votes=config.eval.votes)
    task.finish(model, kept, reports, data)
    return model, reports, kept, logits


NEAR_CHANCE, LEARNED = 0.1, 0.5
"""Shares of the way from chance, the share of the largest class, to 1: below the first a score is near chance, from the
second on a model has learned its training clouds."""


def doubt(
    model: nn.Module, reports: Mapping[str, Report], kept: str, data: Loaders, task: Task, train_oa: float,
) -> str:  # fmt: skip
    """Return one line if a model that has learned its training clouds scores near chance, with the cause; else empty.

    Args:
        model: the final model.
        reports: its evaluations.
        kept: the form of the final model.
        data: the loaders.
        task: evaluates.
        train_oa: accuracy in the batches of the last epoch, in [0, 1].
    """
    report = reports[kept]
    if not isinstance(task, Classification) or not isinstance(report, ClassificationReport):
        return ""
    score, labels = report.oa, data.scored.dataset.labels
    chance = float(labels.bincount().max()) / len(labels)
    near, learned = (chance + share * (1 - chance) for share in (NEAR_CHANCE, LEARNED))
    if train_oa < learned or score > near:
        return ""
    own = task.evaluate(model, data.plain_train).oa
    dataset = data.scored.dataset
    what = "clouds" if isinstance(dataset, PointCloudDataset) else dataset.noun
    found = f"learned {100 * train_oa:.0f} % of its training {what}, yet scores {100 * score:.0f} %, near chance"
    if own <= near:
        return (
            f"warning: the model {found}, and {100 * own:.0f} % on its training {what} in evaluation mode: what its "
            "layers do differs between training and evaluation; train longer, or set eval.recalibrate_batchnorm=true"
        )
    advice = (
        "vertical axis, classes and kinds with s2d3d visualize --split" if what == "clouds" else "classes and kinds"
    )
    return (
        f"warning: the model {found}, and {100 * own:.0f} % on its training {what} in evaluation mode: training and "
        f"test {what} differ; compare their {advice}"
    )
