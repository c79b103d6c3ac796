"""Fine-tuning habits: frozen modules, and learning rates that decrease from the head to the input."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..errors import InputError

BACKBONE = "backbone"
"""Stands for all modules of a model except its head."""


def head_name(model: nn.Module) -> str:
    """Return the name of the module that holds the last linear layer of a classifier; empty for a pre-training model.

    Example:
        >>> head_name(nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2))))
        '1'
    """
    if getattr(model, "task", "classify") != "classify":
        return ""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1].partition(".")[0]


def freeze_(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Freeze modules in place: their parameters take no gradient. `hold_frozen_` keeps them in eval mode.

    Parameters of the model itself, such as a class token that a pre-training lacks, are not frozen.

    Args:
        model: of any kind.
        names: glob patterns over module names; `BACKBONE` stands for all modules except the head.

    Returns:
        Names of the frozen modules, without those inside of others.

    Raises:
        InputError: a pattern matches no module, no module is left to train, or `BACKBONE` of a model without a head.

    Example:
        >>> from s2d3d import create_model
        >>> model = create_model("point_mae", num_classes=5)
        >>> freeze_(model, ["backbone"])
        ['encoder', 'reduce_dim', 'pos_embed', 'blocks', 'norm']
        >>> [name for name, p in model.named_parameters() if p.requires_grad][:3]
        ['cls_token', 'cls_pos', 'cls_head_finetune.0.weight']
    """
    modules = [name for name, _ in model.named_modules() if name]
    chosen: set[str] = set()
    for pattern in names:
        if pattern == BACKBONE:
            if not head_name(model):
                raise InputError(
                    f"train.freeze: {BACKBONE} is all but the head, which a pre-training lacks; name modules"
                )
            found = [name for name, _ in model.named_children() if name != head_name(model)]
        else:
            found = [name for name in modules if fnmatchcase(name, pattern)]
        if not found:
            known = ", ".join(name for name, _ in model.named_children())
            raise InputError(f"train.freeze: no module matches '{pattern}' (modules at the top: {known})")
        chosen.update(found)
    inside = {name for name in chosen for other in chosen - {name} if name.startswith(f"{other}.")}
    frozen = [name for name in modules if name in chosen - inside]
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    if not any(parameter.requires_grad and "." in name for name, parameter in model.named_parameters()):
        raise InputError(f"train.freeze: {', '.join(names)} leaves nothing to train; leave the head out")
    return frozen


def hold_frozen_(model: nn.Module, frozen: Sequence[str]) -> None:
    """Put frozen modules into eval mode: no drop path, no dropout, and BatchNorm with the statistics that it has."""
    for name in frozen:
        model.get_submodule(name).eval()


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Return a factor on the learning rate for each parameter: `decay` to the power of the layers behind it.

    The head, and the last norm with it, have 1, the last block `decay`, the block before it `decay ** 2`, ....

    Args:
        model: with `group_matcher()`, timm's description of the order of layers. Experts have the layer of their FFN.
        decay: in (0, 1].

    Raises:
        InputError: the model does not describe its layers.

    Source: Clark et al. 2020, ELECTRA; for vision transformers Bao et al. 2021, BEiT.

    Example:
        >>> from s2d3d import create_model
        >>> scales = layer_scales(create_model("point_bert_tiny", num_classes=2), 0.5)
        >>> scales["cls_head_finetune.0.weight"], scales["blocks.blocks.3.mlp.fc1.weight"], scales["cls_token"]
        (1.0, 0.5, 0.03125)
    """
    from timm.models import group_parameters

    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        raise InputError(
            f"optim.layer_decay: {type(model).__name__} does not describe its layers by group_matcher(); set it to 1"
        )
    layers = group_parameters(model, matcher(coarse=False), reverse=True)
    last = max(layers.values())
    return {name: decay ** (last - layer) for name, layer in layers.items()}
