"""A plugin of s2d3d: population averaging. Each expert sees a view of its own of the same clouds; they meet rarely.

    python tools/study.py configs/studies/population.yaml

S2D spreads tokens over the experts at random and averages the experts after each update, so they hardly differ. Here
a batch of B clouds is B/K shapes in K views: each has its own sample of points and its own augmentation. All tokens of
view k pass expert k. Every `pull_every` updates the experts move a little towards their mean. The evaluated model
has their mean, as in S2D. A step costs what a dense step of B clouds costs.
"""

from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from s2d3d import RUPMoF, apply_ewa_, register_dataset, register_model
from s2d3d.datasets import PointCloudDataset
from s2d3d.datasets.modelnet40 import load_modelnet40
from s2d3d.models.point_bert import PointBERT
from s2d3d.s2d.dispatch import Partition
from s2d3d.s2d.mof import Plan


class Views(PointCloudDataset):
    """Clouds of which a training batch holds fewer, each several times."""

    views = 1

    def sample(self, indices: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return as many clouds as indices: `views` samples of the first ones, all first samples first.

        Raises:
            ValueError: `views` does not divide the number of indices.
        """
        if generator is not None and self.views > 1:
            shapes, rest = divmod(len(indices), self.views)
            if rest:
                raise ValueError(f"{len(indices)} clouds are no whole number of shapes in {self.views} views")
            indices = indices[:shapes].repeat(self.views)
        return super().sample(indices, generator)


def read_views(root: str, split: str, *, views: int = 1, **keywords: Any) -> Views:
    """Read ModelNet40. `views` is the number of samples of each shape in a training batch.

    Raises:
        InputError: as `load_modelnet40`.
    """
    dataset = load_modelnet40(root, split, **keywords)
    dataset.__class__ = Views
    assert isinstance(dataset, Views)
    dataset.views = views
    return dataset


class ViewExperts(RUPMoF):
    """K experts; the k-th of K equal parts of the batch passes expert k."""

    def draw(self, x: Tensor) -> Plan:
        """Leave the tokens where they are; raises ValueError when K does not divide the number of clouds."""
        if x.shape[0] % self.num_experts:
            raise ValueError(f"{x.shape[0]} clouds cannot be cut into {self.num_experts} equal parts")
        shape = self.places(x)
        order = torch.arange(shape.numel(), device=x.device)
        return Plan(Partition(order, order, self.num_experts, shape.numel(), order), None, shape)


class PopulationBERT(PointBERT):
    """Point-BERT with `ViewExperts` in all blocks, which are pulled towards their mean every `pull_every` updates."""

    updates: Tensor

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        num_experts: int = 4,
        pull: float = 0.05,
        pull_every: int = 10,
        trans_dim: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        num_group: int = 32,
        group_size: int = 32,
        encoder_dims: int = 128,
        encoder_width: int = 32,
        drop_path_rate: float = 0.0,
        head_dropout: float = 0.2,
        init_std: float = 0.1,
    ) -> None:
        """Build the dense model, with its random numbers, then the experts as copies.

        Args:
            num_classes: of the data.
            in_channels: of a point.
            num_experts: K, at least 2.
            pull: share of its way to the mean that an expert moves, in [0, 1].
            pull_every: updates from one pull to the next, at least 1.
            trans_dim, depth, num_heads, num_group, group_size, encoder_dims, encoder_width, drop_path_rate,
                head_dropout, init_std: of `PointBERT`; the defaults are those of `point_bert_small`.
        """
        super().__init__(
            num_classes, in_channels, trans_dim=trans_dim, depth=depth, num_heads=num_heads, num_group=num_group,
            group_size=group_size, encoder_dims=encoder_dims, encoder_width=encoder_width,
            drop_path_rate=drop_path_rate, head_dropout=head_dropout, init_std=init_std,
        )  # fmt: skip
        for block in self.blocks.blocks:
            block.mlp = ViewExperts(cast(nn.Module, block.mlp), num_experts)
        self.share_rate, self.pull_every = pull * (num_experts - 1) / num_experts, pull_every
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, points: Tensor) -> Tensor:
        """Return logits. In training, first pull the experts if it is time: each call is one update."""
        if self.training:
            if self.updates % self.pull_every == 0:
                apply_ewa_(self, self.share_rate)
            self.updates += 1
        return super().forward(points)


register_dataset("modelnet40_views", read_views)
register_model("population_bert", PopulationBERT)
