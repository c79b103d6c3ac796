"""ScanObjectNN in its public HDF5 layout, and simulated scans written in the same layout.

main_split/                         objects with their background
main_split_nobg/                    objects alone
    training_objectdataset{suffix}.h5, test_objectdataset{suffix}.h5
                                    data (n, 2048, 3), label (n,), mask (n, 2048): -1 is background; y up
shape_names.txt                     simulated sets only: their classes

Source: Uy et al. 2019, "Revisiting Point Cloud Classification: A New Benchmark Dataset and Classification Model on
Real-World Data", ICCV.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from ..channels import XYZ
from ..errors import InputError, did_you_mean
from .base import PointCloudDataset
from .h5 import SEE, CloudFile, CloudLayout, check_up_axis, read_h5
from .h5_checks import check_shapes
from .labelled import TRAIN
from .links import check_inside
from .modelnet40 import SPLITS, read_class_names
from .prefix import cache_folders
from .selection import choose_shapes
from .stream import MEMORY_BUDGET_GB, StreamedClouds, exceeds_budget, open_clouds
from .transforms import Transform, turn_up_axis

CLASS_NAMES = (
    "bag",
    "bin",
    "box",
    "cabinet",
    "chair",
    "desk",
    "display",
    "door",
    "shelf",
    "table",
    "bed",
    "pillow",
    "sink",
    "sofa",
    "toilet",
)
"""The published classes, in the order of their labels."""

BACKGROUND = -1
"""Mask value of a point that is not the object's."""

Variant = Literal["OBJ_BG", "OBJ_ONLY", "PB_T25", "PB_T25_R", "PB_T50_R", "PB_T50_RS"]
OBJECT_ONLY = "OBJ_ONLY"
HARDEST = "PB_T50_RS"
VARIANTS = {
    "OBJ_BG": "",
    OBJECT_ONLY: "",
    "PB_T25": "_augmented25_norot",
    "PB_T25_R": "_augmented25rot",
    "PB_T50_R": "_augmentedrot",
    "PB_T50_RS": "_augmentedrot_scale75",
}
"""Variant -> what its file names end in. PB: perturbed boxes; T: moved by up to 25 or 50 %; R: turned; S: scaled."""

SOURCE = "https://hkust-vgd.github.io/scanobjectnn"
PREPARE = "python tools/prepare_data.py scan --from DIR --output"


def load_scanobjectnn(
    root: str | os.PathLike,
    split: str,
    *,
    variant: Variant | None = None,
    background: bool | None = None,
    num_points: int = 1024,
    transform: Transform | None = None,
    channels: str = XYZ,
    up_axis: str | None = None,
    normalize: bool = False,
    classes: Sequence[str] | None = None,
    fraction: float = 1.0,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
    allow_links: bool = False,
    memory_budget_gb: float = MEMORY_BUDGET_GB,
) -> PointCloudDataset:
    """Read one split of one variant; the mask of its points is the data set's `mask`.

    Args:
        root: the folder that holds `main_split`, called `h5_files` in the public archive.
        split: "train" or "test".
        variant: OBJ_BG, OBJ_ONLY, PB_T25, PB_T25_R, PB_T50_R or PB_T50_RS; None: PB_T50_RS, the hardest.
        background: whether to read `main_split`, with background, or `main_split_nobg`; None: as the variant says.
        num_points: points of a sample; see `PointCloudDataset`.
        transform: augmentation.
        channels: of a point; normals are the dataset `normal` of the file, colours `rgb`; public files have neither.
        up_axis: the vertical of the stored points; default the file's attribute, without one "y". They are turned z up.
        normalize: centre the clouds and scale them into the unit sphere; published results do not.
        classes: keep these classes only, numbered in this order.
        fraction: share of the training shapes of each class to keep, in (0, 1]; the test split is kept whole.
        seed: chooses that share.
        cache_dir: where farthest-point prefixes are kept; default beside the set.
        allow_links: follow links that lead out of the folder.
        memory_budget_gb: 10^9 bytes; a split whose points take more stays in its file, see `StreamedClouds`.

    Raises:
        InputError: the folder or a file in it is missing or wrong; an argument is out of range.

    Example:
        >>> test = load_scanobjectnn("data/scanobjectnn", "test", variant="OBJ_BG", num_points=2048)  # doctest: +SKIP
        >>> (test.mask == BACKGROUND).float().mean()  # doctest: +SKIP
    """
    root = Path(root)
    if split not in SPLITS:
        raise InputError(f"unknown split '{split}'{did_you_mean(split, SPLITS)} (known: {', '.join(SPLITS)})")
    if up_axis is not None:
        check_up_axis(up_axis)
    path = check_inside(find_file(root, split, variant or HARDEST, background), root, allow_links=allow_links)
    named = (root / "shape_names.txt").is_file()
    class_names = read_class_names(root, allow_links=allow_links) if named else CLASS_NAMES
    file: CloudFile | CloudLayout
    if exceeds_budget([path], memory_budget_gb, channels):
        clouds, all_labels, _ = open_clouds(
            [path],
            num_classes=len(class_names),
            up_axis=lambda file: up_axis or file.up_axis or "y",
            budget_gb=memory_budget_gb,
            channels=channels,
        )
        file = clouds.layouts[0]
    else:
        file = read_h5(path, num_classes=len(class_names), channels=channels)
        check_shapes(path, file.points[..., :3])
        all_labels = torch.from_numpy(file.label)
    kept, labels, class_names = choose_shapes(
        all_labels, class_names, split=split, classes=classes, fraction=fraction, seed=seed
    )
    names = file.names or [f"{path.stem}_{index:05d}" for index in range(len(file.label))]
    points: torch.Tensor | StreamedClouds
    mask = None
    if isinstance(file, CloudLayout):
        points = clouds.subset(kept)
    else:
        stored = torch.from_numpy(file.points)
        stored = stored if len(kept) == len(stored) else stored[kept]
        points = turn_up_axis(stored, up_axis or file.up_axis or "y", channels=channels)
        mask = None if file.mask is None else torch.from_numpy(file.mask)[kept]
    return PointCloudDataset(
        points,
        labels,
        class_names,
        names=[names[index] for index in kept.tolist()],
        mask=mask,
        split=split,
        num_points=num_points,
        transform=transform,
        normalize=normalize,
        channels=channels,
        cache_dirs=cache_folders(root, cache_dir),
        source=str(path),
    )


def check_keywords(variant: str | None = None, background: bool | None = None) -> dict[str, str]:
    """Return by keyword which values do not go together.

    Example:
        >>> check_keywords("OBJ_ONLY", True)
        {'background': 'OBJ_ONLY is without background; with it the variant is OBJ_BG'}
    """
    if variant == OBJECT_ONLY and background:
        return {"background": "OBJ_ONLY is without background; with it the variant is OBJ_BG"}
    return {}


def find_file(root: Path, split: str, variant: str, background: bool | None = None) -> Path:
    """Return the file of a split and variant.

    Raises:
        InputError: an unknown variant, one that does not go with `background`, or the file is not there.
    """
    if variant not in VARIANTS:
        raise InputError(f"unknown variant '{variant}'{did_you_mean(variant, VARIANTS)} (known: {', '.join(VARIANTS)})")
    for key, text in check_keywords(variant, background).items():
        raise InputError(f"{key}: {text}")
    if background is None:
        background = variant != OBJECT_ONLY
    if not root.is_dir():
        what = "not a folder" if root.exists() else "no such folder"
        advice = f"get ScanObjectNN from {SOURCE} ({SEE}) or simulate it: {PREPARE} {root}"
        raise InputError(f"{root}: {what}; {advice}")
    path = root / relative_path(split, variant, background)
    if path.is_file():
        return path
    if not path.parent.is_dir():
        if any((root / name).is_file() for name in (path.name, f"test_objectdataset{VARIANTS[variant]}.h5")):
            raise InputError(f"{root}: holds the files themselves; name the folder above, that of {path.parent.name}")
        simulated = " (a simulated set has background only)" if (root / "shape_names.txt").is_file() else ""
        raise InputError(f"{root}: no folder {path.parent.name} in it{simulated}; get it from {SOURCE}, {SEE}")
    raise InputError(f"{path}: no such file, variant {variant} needs it; get it from {SOURCE}, {SEE}")


def relative_path(split: str, variant: str, background: bool) -> Path:
    """Return where a file lies below the root.

    Example:
        >>> relative_path("train", "PB_T25", True).as_posix()
        'main_split/training_objectdataset_augmented25_norot.h5'
    """
    folder = "main_split" if background else "main_split_nobg"
    return Path(folder, f"{'training' if split == TRAIN else 'test'}_objectdataset{VARIANTS[variant]}.h5")
