"""The end of a run: the final model, and the evaluations of its forms."""

import copy

from timm.utils import ModelEmaV3
from torch import nn

from ..config.load import Config
from ..evaluation.accuracy import ClassificationReport
from ..evaluation.batchnorm import norms_behind_experts, recalibrate_batchnorm_
from ..machine import Runtime
from ..s2d import merge_experts
from .loaders import Loaders
from .parts import ModelParts
from .task import Classification


def end_model(
    config: Config, runtime: Runtime, data: Loaders, parts: ModelParts, task: Classification, ema: ModelEmaV3 | None
) -> tuple[nn.Module, dict[str, ClassificationReport], str]:
    """Merge the trained model, re-estimate its BatchNorm statistics if the config says so, and evaluate each form.

    A model whose experts have a router is not merged. It is evaluated with its experts.

    Returns:
        The final model, a copy; the evaluations by form of the model; the form of the final model.
    """
    final = copy.deepcopy if parts.routed else merge_experts
    model, scored, kept = final(parts.model), data.scored, "routed" if parts.routed else "merged"
    reports = {"sparse": task.evaluate(parts.model, scored)} if parts.converted and not parts.routed else {}
    reports[kept] = task.evaluate(model, scored)
    if ema:
        reports["ema"] = task.evaluate(final(ema.module), scored)
    if config.eval.recalibrate_batchnorm and (norms := norms_behind_experts(model, config, parts.converted, parts.mof)):
        recalibrate_batchnorm_(model, data.plain_train, device=runtime.device, layers=norms)
        kept = "recalibrated"
        reports[kept] = task.evaluate(model, scored)
    if config.eval.votes > 1:
        reports["voting"] = task.evaluate(model, scored, votes=config.eval.votes)
    return model, reports, kept
