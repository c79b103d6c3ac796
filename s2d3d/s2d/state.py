"""What an FFN may consist of, so that experts can take its place."""

import dis
import inspect
import re
from collections.abc import Callable
from functools import partial
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .linear import CONVOLUTIONS, is_linear, linear_features, linear_parameters
from .sharing import HOOKS, reach_of
from .tokenwise import is_of_packages
from .trial import differ, noise, quiet, randomised

_ADAPTERS = re.compile(r"(?<![a-z])(lora|adapter|base_layer)(?![a-z])")
"""Words in names of modules, such as `lora_A`."""
_PARAMETRIZED = ("parametrizations", "weight_g", "weight_v", "weight_orig", "weight_u", "_mask")


def check_state(ffn: nn.Module) -> None:
    """Refuse an FFN with state that experts cannot have, or whose forward method is not that of its class.

    Raises:
        TypeError: it has no linear layer, a linear layer that is more than its weight and bias (parametrized,
            quantized, with an adapter), or parameters or buffers that belong neither to a linear layer nor to a norm;
            or `forward` was replaced on the instance. The message names the part and the way out.
    """
    kind = getattr(ffn, "shown_as", type(ffn).__name__)
    if any(isinstance(m, torch.jit.ScriptModule) for m in ffn.modules()):
        raise TypeError(f"{kind} is compiled by TorchScript: convert before torch.jit")
    linears = {name: m for name, m in ffn.named_modules() if is_linear(m)}
    if not linears or is_linear(ffn):
        raise TypeError(f"{kind} is not an FFN with nn.Linear layers inside: name another module in targets")
    for name, module in ffn.named_modules():
        if "forward" in vars(module):
            place = f"forward of '{name}'" if name else "forward"
            raise TypeError(
                f"the {place} was replaced on the instance of {kind}, and would go on using the dense weights: "
                "convert before torch.compile, accelerate or other wrappers patch the model"
            )
    _check_others(ffn, kind, linears)
    uses = [id(parameter) for m in set(linears.values()) for parameter in m.parameters()]
    if len(set(uses)) < len(uses):
        raise TypeError(f"{kind} has linear layers that share a parameter, experts would untie them: untie them first")
    for name, linear in linears.items():
        try:
            _check_linear(linear, name)
        except TypeError as error:
            raise TypeError(f"{kind} {error}") from None
    _check_held(ffn, kind)


def _check_held(ffn: nn.Module, kind: str) -> None:
    """Refuse hooks that use weights, and what leads to a part of the FFN and cannot be made to lead to its copy."""
    for name, module in ffn.named_modules():
        kept = [module.__dict__[key] for key in HOOKS]
        for hook in [hook for hooks in kept if isinstance(hooks, dict) for hook in hooks.values()]:
            code = getattr(getattr(hook, "__func__", hook), "__code__", None)
            if code is not None and {"weight", "bias", "parameters"} & {*code.co_names}:
                place = f" on '{name}'" if name else ""
                raise TypeError(f"{kind} has a hook{place} that uses weights, of which experts have K: remove it first")
        if not is_of_packages(module) and not is_linear(module) and any(map(is_linear, module.modules())):
            _check_code(type(module), kind)
    if reach_of(ffn).fixed:
        raise TypeError(f"{kind} holds a function or a weak reference that leads to its own parts: make it a method")


def _check_code(owner: type[nn.Module], kind: str) -> None:
    """Refuse a forward method that reads more of weights than their dtype and device, itself or by other methods."""
    todo, seen = ["forward"], set()
    while todo:
        name = todo.pop()
        code = getattr(inspect.unwrap(getattr(owner, name)), "__code__", None)
        if name in seen or code is None:
            continue
        seen.add(name)
        steps = [step for step in dis.get_instructions(code) if step.opname in ("LOAD_ATTR", "LOAD_METHOD")]
        follows = {step.offset: after for step, after in zip(steps, [*steps[1:], None])}
        for step in steps:
            after = follows[step.offset]
            harmless = after is not None and after.argval in ("dtype", "device", "is_cuda")
            if step.argval in ("weight", "bias") and not harmless:
                raise TypeError(f"{kind} uses the {step.argval} of a layer in its own code, and experts have K of each")
        todo += [str(step.argval) for step in steps if isinstance(vars(owner).get(str(step.argval)), FunctionType)]


def _check_others(ffn: nn.Module, kind: str, linears: dict[str, nn.Module]) -> None:
    """Refuse state that belongs to no linear layer and that experts cannot share."""
    shallow = all(any(m is child for child in ffn.children()) for m in linears.values())  # deeper: may be attention's
    norms = [m for m in ffn.modules() if (_is_norm(m) if shallow else isinstance(m, nn.modules.batchnorm._BatchNorm))]
    owned = [m._parameters.get(key) for m in linears.values() for key in ("weight", "bias")]
    known = {id(tensor) for m in norms for tensor in [*m._parameters.values(), *m._buffers.values()]}
    known |= {id(tensor) for tensor in owned}
    foreign = [name for name, tensor in [*ffn.named_parameters(), *ffn.named_buffers()] if id(tensor) not in known]
    adapters = [name for name, _ in ffn.named_modules() if _ADAPTERS.search(name.lower())]
    if not foreign and not adapters:
        return
    way = "name the module inside that holds linear and norm layers alone, or leave it out of targets"
    if any(word in name for name in foreign for word in _PARAMETRIZED):
        way = "remove the parametrization (weight norm, spectral norm, pruning), convert, and train without it"
    elif adapters or any(_ADAPTERS.search(name.lower()) for name in foreign):
        way = "merge or remove the adapters (LoRA), convert, and add adapters to the merged model"
    raise TypeError(f"{kind} holds state outside its linear layers ({', '.join(foreign or adapters)}): {way}")


def _is_norm(module: nn.Module) -> bool:
    """Tell a norm layer, of torch or with the form of one: its state is shared by the experts."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)):
        return True
    if "norm" not in type(module).__name__.lower() or any(True for _ in module.children()):
        return False
    return all(sum(size > 1 for size in parameter.shape) < 2 for parameter in module.parameters())


def _check_linear(linear: nn.Module, name: str) -> None:
    """Refuse a linear layer that is more than its weight and bias."""
    if linear._parameters.get("weight") is None:
        raise TypeError(f"has no parameter '{name}.weight': convert before its weight is replaced")
    for key in ("weight", "bias"):
        parameter = linear._parameters.get(key)
        if parameter is None:
            continue
        if is_lazy(parameter):
            raise TypeError(f"holds the lazy layer '{name}': run the model once before its conversion")
        if (
            type(parameter) is not nn.Parameter
            or type(parameter.data) is not Tensor
            or not parameter.is_floating_point()
        ):
            kind = type(parameter.data).__name__ if parameter.is_floating_point() else str(parameter.dtype)
            raise TypeError(f"has a {key} of kind {kind} in '{name}': convert before quantizing or sharding the model")
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise TypeError(f"has a gradient hook on '{name}.{key}': register it on the experts, after the conversion")
    stock = next((kind for kind in (nn.Linear, *CONVOLUTIONS) if isinstance(linear, kind)), None)
    if stock is not None and type(linear).forward is stock.forward:
        return
    if not is_of_packages(linear) or (stock is not None and not _maps_as(linear, stock)):
        plain = f"an nn.{'Linear' if stock is None else stock.__name__}"
        raise TypeError(f"holds a {type(linear).__name__}, which is more than {plain}: replace it by {plain} first")


def _maps_as(linear: nn.Module, stock: type[nn.Module]) -> bool:
    """Tell whether a linear layer with a forward method of its own computes and trains as its base class does.

    It may not keep anything either: experts would not.
    """
    with quiet(linear):
        made = randomised(linear)
        weight = linear_parameters(made)[0]
        for mode in (True, False):
            made.train(mode)
            for count in (3, 5):
                x = noise((count, linear_features(made)[0], *[1] * (weight.dim() - 2)), 0, weight)
                before = {key: id(value) for key, value in vars(made).items()}
                try:
                    ours, theirs = (
                        _with_gradients(made, forward, x) for forward in (made, partial(stock.forward, made))
                    )
                except Exception:
                    return False
                if {key: id(value) for key, value in vars(made).items()} != before:
                    return False
                if len(ours) != len(theirs) or any(differ(one, other) > 1 for one, other in zip(ours, theirs)):
                    return False
    return True


@torch.enable_grad()
def _with_gradients(linear: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor | None]:
    parameters, x = [p.requires_grad_() for p in linear.parameters()], x.clone().requires_grad_()
    output = forward(x)
    loss = (output * torch.arange(output.numel()).to(output).sin().view_as(output)).sum()
    return [output, *torch.autograd.grad(loss, [x, *parameters], allow_unused=True)]
