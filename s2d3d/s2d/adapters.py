"""Where a transformer keeps its FFNs, found by structure: as modules of their own, or as two layers of a larger one."""

from torch import Tensor, nn

from .mof import ExpertLayer, Plan, StackedLinear, check_ffn, is_linear, linear_features


class LinearPair(nn.Module):
    """The two linear layers of an FFN that is spread over its transformer layer; holds them and is never called."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second


class EntryLinear(nn.Module):
    """Stands where such an FFN's first linear layer stood; owns the expert layer of both.

    In training its result is in slots, (K, capacity, hidden): whatever lies between the two linear layers must treat
    tokens independently. `ExitLinear`, in the place of the second one, returns the tokens to their places.
    """

    def __init__(self, experts: ExpertLayer) -> None:
        """Take over `experts`, made from a `LinearPair`."""
        super().__init__()
        self.experts = experts
        self.plan: Plan | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens x (..., C) to (K, capacity, hidden), or (..., hidden) where the mean of the experts is used."""
        slots, self.plan = self.experts.dispatch(x)
        return _stacked(self.experts, "first")(slots)

    def averaged_expert(self) -> nn.Module:
        """Return the mean of the experts' first linear layers, of the original class."""
        return _stacked(self.experts, "first").averaged_linear()

    @property
    def weight(self) -> Tensor:
        """The weight of `averaged_expert`: `nn.TransformerEncoderLayer` reads it in evaluation and skips `forward`."""
        return _averaged(_stacked(self.experts, "first"))[0]

    @property
    def bias(self) -> Tensor | None:
        """The bias of `averaged_expert`."""
        return _averaged(_stacked(self.experts, "first"))[1]


class ExitLinear(nn.Module):
    """Stands where the second linear layer of an FFN stood that is spread over its transformer layer."""

    _entry: EntryLinear

    def __init__(self, entry: EntryLinear) -> None:
        super().__init__()
        object.__setattr__(self, "_entry", entry)  # not a sub-module: its parameters are registered once, over there

    def forward(self, hidden: Tensor) -> Tensor:
        """Map what `EntryLinear` returned to tokens (..., D)."""
        plan, self._entry.plan = self._entry.plan, None
        experts = self._entry.experts
        return experts.combine(_stacked(experts, "second")(hidden), plan)

    def averaged_expert(self) -> nn.Module:
        """Return the mean of the experts' second linear layers, of the original class."""
        return _stacked(self._entry.experts, "second").averaged_linear()

    @property
    def weight(self) -> Tensor:
        """The weight of `averaged_expert`, as in `EntryLinear`."""
        return _averaged(_stacked(self._entry.experts, "second"))[0]

    @property
    def bias(self) -> Tensor | None:
        """The bias of `averaged_expert`."""
        return _averaged(_stacked(self._entry.experts, "second"))[1]


def _stacked(experts: ExpertLayer, name: str) -> StackedLinear:
    layer = getattr(experts, name)
    assert isinstance(layer, StackedLinear)
    return layer


def _averaged(layer: StackedLinear) -> tuple[Tensor, Tensor | None]:
    if not layer.averaged_in_eval:
        raise RuntimeError(
            "routed experts have no single weight: in a torch.nn.TransformerEncoder, "
            "call torch.backends.mha.set_fastpath_enabled(False) before evaluation"
        )
    return layer.averaged()


def find_ffn(module: nn.Module) -> tuple[str, ...]:
    """Find the FFN that a conversion target means.

    Returns:
        Names below `module`: `("",)` when it is an FFN itself; `(name,)` of the only one inside; `(first, second)` of
        two linear layers which are the FFN of this transformer layer, such as `("fc1", "fc2")` of OPT.

    Raises:
        TypeError: there is no FFN, or more than one.
    """
    try:
        check_ffn(module)
    except TypeError as error:
        found = find_ffns(module)
        if not found:
            raise
        if len(found) > 1:
            names = ", ".join(ffn_name(ffn) for ffn in found[:4]) + (", ..." if len(found) > 4 else "")
            raise TypeError(f"{type(module).__name__} holds {len(found)} FFNs ({names}): name each") from error
        return found[0]
    return ("",)


def find_ffns(module: nn.Module) -> list[tuple[str, ...]]:
    """Find all FFNs inside a module, named as by `find_ffn`: whole modules first, then pairs of layers."""
    whole = [name for name, child in module.named_modules() if name and _is_ffn_like(child)]
    pairs = _linear_pairs(module)
    return [(name,) for name in whole] + [
        pair for pair in pairs if not any(pair[0].startswith(f"{name}.") for name in whole)
    ]


def ffn_name(names: tuple[str, ...]) -> str:
    """Return the name of the smallest module that holds an FFN found by `find_ffns`."""
    if len(names) == 1:
        return names[0]
    first, second = (name.split(".")[:-1] for name in names)
    depth = next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
    return ".".join(first[:depth])


def _is_ffn_like(module: nn.Module) -> bool:
    """Tell an FFN from an attention: not all layers are square, at most two read the input, none makes q, k and v."""
    sizes = [linear_features(child) for child in module.children() if is_linear(child)]
    if len(sizes) < 2 or sizes[0][0] != sizes[-1][1] or all(i == o for i, o in sizes):
        return False
    channels = sizes[0][0]
    if sum(i == channels for i, _ in sizes) > 2 or (
        sizes[0] == (channels, 3 * channels) and sizes[1:] == [(channels, channels)]
    ):
        return False
    try:
        check_ffn(module)
    except TypeError:
        return False
    return True


def _linear_pairs(module: nn.Module) -> list[tuple[str, ...]]:
    """Find neighbouring linear layers, widening and narrowing, that have no third one beside them."""
    linears = [(name, child) for name, child in module.named_modules() if name and is_linear(child)]
    parents = [name.rpartition(".")[0] for name, _ in linears]
    pairs: list[tuple[str, ...]] = []
    for index in range(len(linears) - 1):
        (first, up), (second, down) = linears[index : index + 2]
        narrow, wide = linear_features(up)
        siblings = {parents.count(parent) for parent in parents[index : index + 2]}
        alone = siblings == ({2} if parents[index] == parents[index + 1] else {1})
        if alone and wide > narrow and linear_features(down) == (wide, narrow):
            pairs.append((first, second))
    return pairs
