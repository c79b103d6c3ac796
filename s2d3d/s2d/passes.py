"""The passes of an FFN and of its experts side by side: where do they differ?"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .linear import StackedLinear, linear_parameters
from .sharing import copied
from .trial import Call, copied_call, differ, first_line, left_behind, noise, pinned, tensors_of

LEAVE = "a token would meet several experts; leave it out of targets"


def difference(dense: nn.Module, sparse: nn.Module, calls: list[Call], in_slots: bool) -> str:
    """Say how the training pass of experts, or the evaluation, is another one than that of `dense`; "": it is not."""
    for mode in (True, False):
        dense.train(mode), sparse.train(mode)
        for call in calls if mode else calls[:1]:  # the mean of the experts takes any shape
            try:
                wanted, found = _trained(dense, call, backward=mode), _trained(sparse, call, backward=mode)
            except Exception as error:
                return first_line(error)
            if mode and in_slots and not _drawn_by_slot(wanted.draws, found.draws, call, sparse):
                return "it draws random numbers for several tokens at once"
            if differ(found.outputs, wanted.outputs) > 1:
                return f"other outputs in {'training' if mode else 'evaluation'}"
            if differ(*([b for b in m.buffers() if b.is_floating_point()] for m in (sparse, dense))) > 1:
                return "other statistics"
            kept, other = left_behind(dense), left_behind(sparse)
            for name, value in kept.items():
                if name in other and (differ(other[name], value) > 1 or _numbers(other[name]) != _numbers(value)):
                    return f"another value of its attribute '{name}'"
            if mode:
                weights = {name: m.weight for name, m in sparse.named_modules() if isinstance(m, StackedLinear)}
                unused = [name for name, weight in weights.items() if weight.grad is None]
                if unused:
                    return f"its forward method does not use the weights of {', '.join(unused)}"
                if any(differ(one, another) > 1 for one, another in _gradients(found, wanted, dense, sparse)):
                    return "other gradients"
    return ""


def _gradients(found: "_Trained", wanted: "_Trained", dense: nn.Module, sparse: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Iterate over pairs of gradients that must be equal, one of them summed over the experts."""
    yield found.gradient, wanted.gradient
    linears = dict(dense.named_modules())
    for name, module in sparse.named_modules():
        stacked = module if isinstance(module, StackedLinear) else getattr(module, "stacked", None)
        linear = linears.get(name)
        if not isinstance(stacked, StackedLinear) or linear is None:
            continue
        for ours, theirs in zip((stacked.weight, stacked.bias), linear_parameters(linear)):
            if ours is None or theirs is None or (ours.grad is None and theirs.grad is None):
                continue
            gradient = None if ours.grad is None else ours.grad.sum(0)
            if gradient is not None and theirs.dim() > 1:
                gradient = (gradient if stacked.input_first else gradient.t()).reshape(theirs.shape)
            yield gradient, theirs.grad


@torch.no_grad()
def meets_several_experts(sparse: nn.Module, call: Call, channels_first: bool) -> bool:
    """Tell whether a token meets several experts, by experts that differ: does no expert alone give its output?

    Statistics over tokens are held, for an expert alone has others.
    """
    stacked = [m for m in sparse.modules() if isinstance(m, StackedLinear)]
    parameters = [parameter for layer in stacked for parameter in layer.parameters()]
    apart = [parameter + noise(parameter.shape, 3, parameter) for parameter in parameters]
    sparse.train()
    for module in sparse.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            module.eval()

    def run(values: list[Tensor]) -> Tensor:
        for parameter, value in zip(parameters, values):
            parameter.copy_(value)
        with pinned():
            output = copied_call(call).on(copied(sparse))  # it may count its calls
        return (output.movedim(1, -1) if channels_first else output).flatten(0, -2)

    mixed = run(apart)
    alone = torch.stack([run([value[k].expand_as(value) for value in apart]) for k in range(stacked[0].num_experts)])
    gap = (alone - mixed).abs().amax(-1).amin(0)
    return bool((gap > 1e-4 * alone.abs().max()).any())


@torch.no_grad()
def check_pair(sparse: nn.Module, call: Call, parts: tuple[str, ...], in_slots: bool) -> None:
    """Refuse a transformer layer that uses the two linear layers of its FFN in another way than one after the other.

    Args:
        sparse: a copy of a transformer layer with identical experts; of no use afterwards.
        call: how it is called.
        parts: names of the two linear layers.
        in_slots: a trial has shown that each token stays in its place between the two.

    Raises:
        TypeError: one is called more often, a weight is used outside its linear layer, or tokens change places.
    """
    kind, entry, exit_ = type(sparse).__name__, *(sparse.get_submodule(part) for part in parts)
    order: list[nn.Module] = []
    for part in (entry, exit_):
        part.register_forward_pre_hook(lambda module, _: order.append(module))
    with pinned():
        wanted = copied_call(call).on(sparse.train())
    if not order or order != [entry, exit_] * (len(order) // 2):
        raise TypeError(f"{kind} does not call its linear layers one after the other: {LEAVE}")
    for part in (entry, exit_):
        part._averaged = partial(_blank, part.stacked)  # type: ignore[assignment, arg-type]
    with pinned():
        found = copied_call(call).on(sparse)
    if differ(found, wanted) > 1:
        raise TypeError(f"{kind} uses a weight outside its linear layer, and each expert has another one")
    if not in_slots and _reorders(sparse, call, entry, exit_):
        raise TypeError(f"{kind} gives its linear layers other tokens, or in another order: {LEAVE}")


def _blank(stacked: StackedLinear) -> tuple[Tensor, Tensor | None]:
    weight, bias = stacked.averaged()
    return weight * torch.nan, None if bias is None else bias * torch.nan


def _reorders(sparse: nn.Module, call: Call, entry: nn.Module, exit_: nn.Module) -> bool:
    """Tell whether a token stands in another place at the second linear layer of an FFN than it left the first.

    The results of the first are changed in some places: the second must get something else in each of these.
    """
    marks, seen, seed = torch.zeros(0), [], 0

    def change(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal marks
        marks = noise(output.shape[:-1], seed, output) > 0
        if seed:
            output[marks] += 9 * noise(output[marks].shape, seed, output)

    entry.register_forward_hook(change)
    exit_.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for seed in range(4):
        with pinned():
            copied_call(call).on(sparse.train())
        same = (seen[-1] == seen[0]).all(-1)
        if seed and same.shape == marks.shape and same[marks].any():
            return True
    return False


class _Trained(NamedTuple):
    outputs: list[Any]
    gradient: Tensor | None
    draws: list[torch.Size]


def _trained(module: nn.Module, call: Call, backward: bool) -> _Trained:
    """Run a module on a copy of a call; return also what became of the tokens, and their gradient."""
    leaf = call.tokens.detach().clone()
    leaf.requires_grad_(backward and leaf.is_floating_point())
    module.zero_grad()
    before = {id(value) for values in left_behind(module).values() for value in values}
    with torch.set_grad_enabled(backward):
        tokens = leaf.clone()
        with pinned() as run:
            output = copied_call(call).with_tokens(tokens).on(module)
        kept = [value for values in left_behind(module).values() for value in values if id(value) not in before]
        outputs = [tensor for tensor in tensors_of([output, kept]) if tensor.requires_grad]  # a loss may be kept
        if outputs:
            steps = [torch.arange(out.numel(), device=out.device).sin().view_as(out) for out in outputs]
            loss = torch.stack([(out * step).sum().double() for out, step in zip(outputs, steps)]).sum()
            loss.backward(retain_graph=True)  # it may go through a sum over calls
    return _Trained([output, tokens], leaf.grad, run.draws)


def _numbers(values: list[Any]) -> list[Any]:
    return [value for value in values if not isinstance(value, Tensor)]


def _drawn_by_slot(expected: list[torch.Size], actual: list[torch.Size], call: Call, sparse: nn.Module) -> bool:
    """Tell whether all random numbers in slots are drawn as for tokens: for each by itself, or for none of them.

    Not so, for instance, stochastic depth inside an FFN: one draw a sample would become one draw an expert.
    """
    experts = next(m.num_experts for m in sparse.modules() if isinstance(m, StackedLinear))
    width = call.tokens.shape[1 if getattr(getattr(sparse, "layout", None), "channels_first", False) else -1]
    tokens = call.tokens.numel() // width
    capacity = -(-tokens // experts)
    if len(expected) != len(actual):
        return False
    for one, other in zip(expected, actual):
        if one == other and other[:1] != (experts,):
            continue
        by_slot = (experts, capacity) in (other[:2], (*other[:1], *other[2:3])) or other[:1] == (experts * capacity,)
        if not by_slot or other.numel() * tokens != one.numel() * experts * capacity:
            return False
    return True
