"""A plugin of s2d3d: small images of labelled classes, and a small timm vision transformer trained from scratch.

    python tools/train.py examples/images/cifar_vit.yaml data.root=cifar10_small.h5

`data.root` is an HDF5 file with the groups `train` and `test`. Each holds `image` (n, H, W, 3) uint8 and `label` (n,);
the attribute `class_names` of the file names the classes. The trainer, the method, the checkpoints and the study runner
are those of point clouds. This file adds what differs: how a sample is read and augmented, and the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import h5py
import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Generator, Tensor

from s2d3d import register_dataset, register_model
from s2d3d.datasets import LabelledDataset
from s2d3d.datasets.selection import choose_shapes
from s2d3d.errors import InputError, first_line


@dataclass(frozen=True)
class CropAndFlip:
    """Move each image by up to `crop` pixels along each axis, filled with grey, and mirror every second one.

    Both are one gather over the batch, which costs about 1 % of a training step.

    Attributes:
        crop: largest shift in pixels, at least 0: the random crop of an image padded by `crop`.
        flip: mirror left and right with a chance of one half.
    """

    crop: int = 4
    flip: bool = True

    def __call__(self, images: Tensor, generator: Generator) -> Tensor:
        """Augment images (B, 3, H, W), each with random numbers of its own; 0 is grey."""
        count, channels, height, width = images.shape
        top, left = torch.randint(2 * self.crop + 1, (2, count, 1), generator=generator)
        mirrored = torch.rand(count, 1, generator=generator) < (0.5 if self.flip else 0.0)
        padded = torch.nn.functional.pad(images, (self.crop,) * 4)
        rows, columns = torch.arange(height), torch.arange(width)
        rows = rows + top
        columns = torch.where(mirrored, columns.flip(0), columns) + left
        places = (rows[:, :, None] * padded.shape[3] + columns[:, None, :]).view(count, 1, -1)
        moved = padded.flatten(2).gather(2, places.expand(-1, channels, -1))
        return moved.view(count, channels, height, width)


class ImageDataset(LabelledDataset):
    """Labelled images in memory; a sample is (3, H, W) float32 in [-1, 1].

    Args:
        images: (n, H, W, 3) uint8; not changed.
        labels: (n,) int64.
        class_names: one name for each class.
        **options: of `LabelledDataset`: `names`, `split`, `transform`, `source`.
    """

    noun: ClassVar[str] = "images"

    def __init__(self, images: Tensor, labels: Tensor, class_names: list[str], **options) -> None:
        super().__init__(labels, class_names, **options)
        self._images = images

    def sample(self, indices: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return images (B, 3, H, W) and labels (B,); there is nothing to choose at random."""
        rows = self._rows[indices]
        images = self._images[rows].permute(0, 3, 1, 2).float() / 127.5 - 1
        return images.contiguous(), self._storage_labels[rows]


def read_images(
    root: str | Path, split: str, *, classes=None, fraction=1.0, seed=0, crop: int = 4, flip: bool = True, **_
) -> ImageDataset:
    """Read one split of the HDF5 file `root`. `fraction` and `seed` choose training images, the same share of a class.

    Raises:
        InputError: the file is missing, or its content is not as the module describes it.
    """
    path = Path(root)
    if not path.is_file():
        raise InputError(f"{path}: no such file; name the HDF5 file by data.root=FILE")
    try:
        with h5py.File(path) as file:
            names = [str(name) for name in file.attrs["class_names"]]
            images, labels = (np.asarray(file[split][key][()]) for key in ("image", "label"))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as images of split '{split}' ({first_line(error)})") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or labels.shape != images.shape[:1]:
        found = f"{images.dtype} {images.shape} and {labels.shape}"
        raise InputError(f"{path}: split '{split}' must hold uint8 (n, H, W, 3) images and (n,) labels, found {found}")
    if labels.dtype.kind not in "iu" or not (len(labels) and 0 <= labels.min() <= labels.max() < len(names)):
        raise InputError(f"{path}: labels of split '{split}' must be whole numbers in [0, {len(names)})")
    rows, kept, names = choose_shapes(
        torch.from_numpy(labels.astype(np.int64)), names, split=split, classes=classes, fraction=fraction, seed=seed
    )
    transform = CropAndFlip(crop, flip) if split == "train" else None
    return ImageDataset(
        torch.from_numpy(images)[rows], kept, names, names=[f"{split}_{row:05d}" for row in rows.tolist()],
        split=split, transform=transform, source=str(path),
    )  # fmt: skip


def check_images(crop: int, flip: bool) -> Mapping[str, str]:
    """Return what is wrong with the keys `data.crop` and `data.flip`."""
    return {} if 0 <= crop <= 16 else {"crop": f"must be in [0, 16], got {crop}"}


def small_vit(
    num_classes: int,
    in_channels: int = 3,
    *,
    img_size: int = 32,
    patch_size: int = 4,
    embed_dim: int = 64,
    depth: int = 6,
    num_heads: int = 2,
    mlp_ratio: float = 4.0,
    drop_path_rate: float = 0.0,
) -> VisionTransformer:
    """Build timm's vision transformer without a class token: the head takes the mean of all patches."""
    return VisionTransformer(
        img_size=img_size, patch_size=patch_size, in_chans=in_channels, num_classes=num_classes, embed_dim=embed_dim,
        depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio, drop_path_rate=drop_path_rate, class_token=False,
        global_pool="avg",
    )  # fmt: skip


register_dataset("images", read_images, check_images, kind=ImageDataset)
register_model("small_vit", small_vit)
