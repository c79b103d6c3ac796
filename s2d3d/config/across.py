"""Checks that need more than one key of a config, and whether its model can be built."""

from typing import TYPE_CHECKING, Any

from ..channels import XYZ
from .clouds import votes_problems
from .io import Problem, one_line

if TYPE_CHECKING:
    from .schema import Config, S2DConfig


def problems_across(config: "Config") -> list[Problem]:
    """Return what does not go together in a config whose keys are valid on their own."""
    optim, train, s2d = config.optim, config.train, config.s2d
    problems: list[Problem] = []
    refused: list[Problem] = []
    for key in ("warmup_lr", "min_lr"):
        value = getattr(optim, key)
        if value > optim.lr:
            problems.append(Problem(("optim", key), f"must be at most optim.lr ({optim.lr:g}), got {value:g}"))
    if optim.warmup_epochs >= train.epochs:
        text = f"must be less than train.epochs ({train.epochs}), got {optim.warmup_epochs:g}"
        problems.append(Problem(("optim", "warmup_epochs"), text))
    if train.batch_size % train.accum_steps:
        text = f"must divide train.batch_size ({train.batch_size}), got {train.accum_steps}"
        problems.append(Problem(("train", "accum_steps"), text))
    if train.keep_every and train.keep_every % train.save_every:
        text = f"must be a multiple of train.save_every ({train.save_every}), got {train.keep_every}"
        problems.append(Problem(("train", "keep_every"), text))
    if train.compile_mode != "default":
        if not train.compile:
            text = f"has no effect without train.compile: true, got '{train.compile_mode}'"
            problems.append(Problem(("train", "compile_mode"), text))
        elif train.accum_steps > 1:  # autograd keeps the first gradient where the graph writes the next
            text = f"must be 'default' with train.accum_steps {train.accum_steps}: a CUDA graph overwrites the"
            text = f"{text} gradients to add to, got '{train.compile_mode}'"
            problems.append(Problem(("train", "compile_mode"), text))
    if config.eval.split == "validation" and not config.data.val_fraction:
        text = "'validation' needs data.val_fraction above 0; set it, or score the test split"
        problems.append(Problem(("eval", "split"), text))
    if config.data.channels != XYZ:
        refused = build_problems(config.model.name, config.model.kwargs, in_channels=config.in_channels)
        problems += [Problem(("data", "channels"), f"{config.model.name}: {p.text}") for p in refused]
    if s2d.kind != "none":
        from ..s2d.ewa import max_share_rate

        if any(name in optim.name for name in ("muon", "adamp", "sgdp", "mars")):
            text = "must not be Muon, AdamP, SGDP or MARS with experts: they do other things with stacks of matrices"
            problems.append(Problem(("optim", "name"), f"{text}, got '{optim.name}'"))
        experts, bound = s2d.num_experts, max_share_rate(s2d.num_experts)
        if s2d.share_rate > bound:
            text = f"must be at most {bound:.6g} = ({experts} - 1) / {experts}, above which the {experts} experts"
            problems.append(Problem(("s2d", "share_rate"), f"{text} overshoot their mean, got {s2d.share_rate:g}"))
        if s2d.init == "independent" and config.model.pretrained:
            text = "must be 'copy' with model.pretrained: experts drawn anew would not be pretrained, got 'independent'"
            problems.append(Problem(("s2d", "init"), text))
        if not refused:
            refused = build_problems(config.model.name, config.model.kwargs, s2d, in_channels=config.in_channels)
            problems += [Problem(("s2d",), problem.text) for problem in refused]
    return problems + votes_problems(config.data.name, config.eval.votes) + _task_problems(config)


def _task_problems(config: "Config") -> list[Problem]:
    """Return what does not go with the task."""
    from ..models import list_models, model_task

    if (fits := model_task(config.model.name)) != config.task:
        known = ", ".join(list_models(task=config.task))
        text = f"is for task: {fits}, the config says task: {config.task}, got '{config.model.name}' (known: {known})"
        return [Problem(("model", "name"), text)]
    if config.task == "classify":
        text = "is for task: pretrain; a classifier is scored by its accuracy"
        return [Problem(("eval", "probe"), text)] if config.eval.probe else []
    idle = {"eval.votes": config.eval.votes > 1, "train.label_smoothing": config.train.label_smoothing > 0}
    return [
        Problem(tuple(key.split(".")), "has no meaning for task: pretrain, which has no classes; remove it")
        for key, given in idle.items()
        if given
    ]


def build_problems(
    model: str, kwargs: dict[str, Any], s2d: "S2DConfig | None" = None, *, in_channels: int = 3
) -> list[Problem]:
    """Build the model without memory for its weights, with experts if `s2d` is given, and return its error messages.

    What could be built once is not built again: the runs of a study share it, and a name keeps its model.
    """
    import torch

    from ..models import create_for_classes
    from ..s2d import convert_to_mof_

    try:
        experts = s2d.mof() if s2d else None
        if (key := (model, repr(kwargs), repr(experts), in_channels)) in _BUILT:
            return []
        with torch.device("meta"):
            network = create_for_classes(model, 2, in_channels=in_channels, **kwargs)
            if experts:
                convert_to_mof_(network, experts)
    except (ValueError, TypeError, RuntimeError, ArithmeticError, AssertionError) as error:
        return [Problem((), one_line(error) or type(error).__name__)]
    _BUILT.add(key)
    return []


_BUILT: set[tuple[str, str, str, int]] = set()
"""Names, keyword arguments, experts and channels of the models that this process could build."""
