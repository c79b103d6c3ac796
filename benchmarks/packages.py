"""Public mixture-of-experts layers, if they are installed, at the size of the dense FFN that they replace.

All of them route tokens with a learned gate. Their results differ from the dense FFN, so only their time is compared.
"""

import importlib
import warnings
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

from torch import nn

from .interleave import Skip


class Package(NamedTuple):
    """A public layer.

    `build(dim, hidden, tokens, num_experts)` makes it for sequences of `tokens` tokens.
    """

    name: str
    build: Callable[[int, int, int, int], nn.Module]
    note: str


def packages() -> list[Package]:
    """List the layers that are contestants if their package is installed."""
    return [
        Package("mixture-of-experts top-2", _mixture_of_experts, "routed, capacity factor 1.25"),
        Package("st-moe-pytorch top-2", _st_moe, "routed, capacity factor 1.25, GEGLU experts of 2/3 width"),
        Package("soft-moe-pytorch", _soft_moe, "soft slots, as many as tokens"),
        Package("tutel top-1", _tutel, "routed"),
        Package("transformers Mixtral top-1", partial(_mixtral, 1), "routed, SwiGLU experts of 2/3 width, no bias"),
        Package("transformers Mixtral top-2", partial(_mixtral, 2), "routed, SwiGLU experts of 2/3 width, no bias"),
    ]


INSTALL = {
    "torch-cluster": "pip install --no-build-isolation torch-cluster",
    "pyg-lib": "it is on no package index, see the page on installation of torch-geometric",
    "tutel": "it is on no package index; "
    "pip install --no-build-isolation git+https://github.com/microsoft/tutel builds it",
}
"""Install commands of packages that `pip install NAME` does not install."""


def require(module: str, package: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: what to import.
        package: its name, for the reason.

    Raises:
        Skip: it is not installed, or does not load.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about their own code, which nobody here can change
            return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: compiled for another torch
        detail = "" if isinstance(error, ModuleNotFoundError) else f" ({str(error).splitlines()[0]})"
        install = INSTALL.get(package, f"pip install {package}")
        raise Skip(f"{package} is not usable here{detail}; {install}") from None


def _mixture_of_experts(dim: int, hidden: int, tokens: int, num_experts: int) -> nn.Module:
    package = require("mixture_of_experts", "mixture-of-experts")
    return package.MoE(dim, num_experts=num_experts, hidden_dim=hidden, activation=nn.GELU, capacity_factor_train=1.25)


def _st_moe(dim: int, hidden: int, tokens: int, num_experts: int) -> nn.Module:
    package = require("st_moe_pytorch", "st-moe-pytorch")
    return package.MoE(dim, num_experts=num_experts, expert_hidden_mult=hidden / dim, gating_top_n=2)


def _soft_moe(dim: int, hidden: int, tokens: int, num_experts: int) -> nn.Module:
    package = require("soft_moe_pytorch", "soft-moe-pytorch")
    return package.SoftMoE(dim, seq_len=tokens, num_experts=num_experts, expert_mult=hidden // dim)


def _tutel(dim: int, hidden: int, tokens: int, num_experts: int) -> nn.Module:
    moe = require("tutel.moe", "tutel")
    return moe.moe_layer(
        gate_type={"type": "top", "k": 1},
        model_dim=dim,
        experts={
            "type": "ffn",
            "num_experts_per_device": num_experts,
            "hidden_size_per_expert": hidden,
            "activation_fn": nn.functional.gelu,
        },
    )


def _mixtral(top_k: int, dim: int, hidden: int, tokens: int, num_experts: int) -> nn.Module:
    modeling = require("transformers.models.mixtral.modeling_mixtral", "transformers")
    config = modeling.MixtralConfig(
        hidden_size=dim,
        intermediate_size=2 * hidden // 3,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    config._experts_implementation = "eager"
    block = modeling.MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block
