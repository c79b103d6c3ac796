"""Expert layers under FSDP2: shard inside the experts, so that their mean needs no communication."""

from collections.abc import Callable

from torch import nn
from torch.distributed.tensor import Shard

from .mof import ExpertLayer


def expert_placement(model: nn.Module) -> Callable[[nn.Parameter], Shard | None]:
    """Return a `shard_placement_fn` for `torch.distributed.fsdp.fully_shard`.

    Stacked expert parameters (K, ...) are sharded on dimension 1, every other one as FSDP2 does by default, on
    dimension 0. A rank then holds a part of *every* expert: `EWA.step()` and the merge compute the mean over K locally,
    and ranks are loaded equally for any K. Dimension 1 must be divisible by the number of ranks, as FSDP2
    demands of every dimension but the first.

    Args:
        model: the converted model, before `fully_shard`.

    Example:
        >>> from timm.layers import Mlp
        >>> from s2d3d import RUPMoF
        >>> layer = RUPMoF(Mlp(8, 32), num_experts=4)
        >>> place = expert_placement(layer)
        >>> {place(parameter) for parameter in layer.parameters()}
        {Shard(dim=1)}
    """
    stacked = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, ExpertLayer)
        for parameter in module.expert_parameters()
    }
    return lambda parameter: Shard(1) if id(parameter) in stacked else None
