"""BatchNorm statistics of a merged model: which layers lie behind experts, and their re-estimation on training data."""

import contextlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config.load import Config
from ..errors import InputError
from ..models import create_for_classes
from ..models.mode import eval_mode
from ..s2d import MoFConfig, convert_to_mof_
from ..s2d.merge import linears_with_experts

FORGOTTEN = 1e-5
"""Weight of the initial statistics below which they do not matter."""


def batchnorms_behind(model: nn.Module, module_name: str) -> list[_BatchNorm]:
    """Return the BatchNorm layers registered after a module, which may therefore receive its output."""
    modules = list(model.named_modules())
    start = [name for name, _ in modules].index(module_name)
    return [m for _, m in modules[start + 1 :] if isinstance(m, _BatchNorm)]


@torch.no_grad()
def recalibrate_batchnorm_(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device | str = "cpu",
    layers: Sequence[_BatchNorm] | None = None,
) -> int:
    """Re-estimate BatchNorm statistics as plain averages over a loader, in place.

    BatchNorm behind expert layers accumulated its statistics during sparse training, not from the merged model. All
    other layers run in eval mode. Every batch has the same weight, also one that is not full. Use training
    data without augmentation.

    Args:
        model: the merged model, on `device`.
        loader: yields points and labels; labels are not used.
        device: where to compute.
        layers: the BatchNorm layers to treat; default all.

    Returns:
        The number of layers treated; with 0 the loader is not read.

    Raises:
        InputError: an empty loader; the statistics are unchanged.

    Example:
        >>> loader = [(torch.rand(4, 3), torch.zeros(4))]
        >>> recalibrate_batchnorm_(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), loader)
        1
    """
    chosen = [m for m in model.modules() if isinstance(m, _BatchNorm)] if layers is None else layers
    norms = [m for m in chosen if m.track_running_stats]
    if not norms:
        return 0
    momenta = [m.momentum for m in norms]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    batches = 0
    try:
        with eval_mode(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # cumulative average
                norm.train()
            for points, _ in loader:
                model(points.to(device))
                batches += 1
        if not batches:
            raise InputError("the loader yields no batch to re-estimate BatchNorm statistics from")
    except BaseException:
        for norm, buffers in zip(norms, before):
            norm.load_state_dict(buffers, strict=False)
        raise
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
    return len(norms)


def norms_behind_experts(
    model: nn.Module, config: Config, converted: Sequence[str], mof: MoFConfig
) -> list[_BatchNorm]:
    """Return the BatchNorm layers behind the first expert layer, or behind the FFN that would be one in a sparse run.

    Args:
        model: as `config` describes it, merged.
        config: of the run.
        converted: names of its expert layers; empty for a dense run.
        mof: which FFNs the sparse counterpart of a dense run converts.
    """
    converted = converted or names_of_experts(config, mof)[0]
    return batchnorms_behind(model, converted[0]) if converted else []


def unsettled_norms(model: nn.Module, updates: int) -> list[_BatchNorm]:
    """Return the BatchNorm layers whose statistics still hold too much of their initial values.

    Each update leaves 1 - momentum of what was there before. The initial mean 0 and variance 1 are forgotten when their
    weight is at most `FORGOTTEN`: after 110 updates with the usual momentum of 0.1.

    Args:
        model: after its training.
        updates: training passes of each layer.

    Example:
        >>> norm = nn.BatchNorm1d(3)
        >>> unsettled_norms(norm, 109) == [norm], unsettled_norms(norm, 110)
        (True, [])
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    return [norm for norm in norms if norm.momentum is not None and (1 - norm.momentum) ** updates > FORGOTTEN]


def names_of_experts(config: Config, mof: MoFConfig) -> tuple[list[str], list[str]]:
    """Name the FFNs of a dense run that `mof` would convert, and their linear layers; empty where there are none."""
    with torch.device("meta"):
        model = create_for_classes(config.model.name, 2, in_channels=config.in_channels, **config.model.kwargs)
        with contextlib.suppress(ValueError, TypeError):  # a dense model need not have an FFN
            return convert_to_mof_(model, mof), linears_with_experts(model)
    return [], []
