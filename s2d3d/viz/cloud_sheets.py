"""The sheets of clouds that `tools/visualize.py` draws: content, order, captions and colours."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from torch import Tensor, nn

from ..channels import XYZ
from ..datasets.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from ..errors import InputError
from .sheet import CloudSheet
from .tokens import TokenExperts

WRONG = "#c2410c"
GREY = (0.72, 0.74, 0.77)
CENTER_SCALE = 2.2
"""Size of a centre relative to a point."""
EXPERT_COLORS = tuple(
    tuple(int(color[start : start + 2], 16) / 255 for start in (1, 3, 5))
    for color in ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#4d4d4d")
)
"""Colours of experts 0, 1, ..., from Okabe and Ito, suitable for most colour-blind people. They repeat after eight."""


def gallery_sheet(
    points: Tensor, labels: Tensor, class_names: Sequence[str], title: str, colors: Tensor | None = None
) -> CloudSheet:
    """Show clouds with their class, in their own colours or coloured by height, in the order of the classes.

    Args:
        points: (n, N, 3), z up.
        labels: (n,) int64.
        class_names: names of the labels.
        title: of the sheet.
        colors: (n, N, 3) in [0, 1]; default by height.

    Example:
        >>> gallery_sheet(torch.rand(2, 9, 3), torch.tensor([1, 0]), ["box", "mug"], "two").captions
        ['box', 'mug']
    """
    order = labels.argsort(stable=True)
    captions = [class_names[label] for label in labels[order]]
    return CloudSheet(points[order], captions, title, None if colors is None else list(colors[order]))


def by_mistake(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Order predictions, worst first: wrong before right, then by the probability of the true class.

    Args:
        probabilities: (n, num_classes).
        labels: (n,) int64, the true classes.

    Returns:
        (n,) int64 indices; the order of equal predictions is kept.

    Example:
        >>> by_mistake(torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]]), torch.tensor([0, 0, 0])).tolist()
        [2, 1, 0]
    """
    of_truth = probabilities.gather(1, labels[:, None])[:, 0].double()
    return (of_truth + (probabilities.argmax(1) == labels)).argsort(stable=True)


def predictions_sheet(
    points: Tensor, labels: Tensor, probabilities: Tensor, class_names: Sequence[str], title: str
) -> CloudSheet:
    """Show clouds with their true and predicted class and the confidence, the worst mistakes first and framed.

    Args:
        points: (n, N, 3), z up.
        labels: (n,) int64, the true classes.
        probabilities: (n, num_classes) of the model.
        class_names: names of the labels.
        title: of the sheet, below the number of recognised clouds.

    Example:
        >>> likely = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
        >>> predictions_sheet(torch.rand(2, 9, 3), torch.tensor([0, 1]), likely, ["box", "mug"], "two").captions
        ['mug\\ntaken for box, 80 %', 'box\\nrecognised, 90 %']
    """
    order = by_mistake(probabilities, labels)
    right = probabilities.argmax(1) == labels
    captions = [prediction_caption(probabilities[i], class_names, int(labels[i])) for i in order.tolist()]
    marks = [None if right[i] else WRONG for i in order.tolist()]
    score = f"{int(right.sum())} of {len(right)} clouds recognised"
    return CloudSheet(points[order], captions, f"{score}\n{title}; colour shows height", marks=marks)


def prediction_caption(probabilities: Tensor, class_names: Sequence[str], label: int) -> str:
    """Return the true class, and below it the prediction with its confidence: probabilities (num_classes,)."""
    confidence, guess = probabilities.max(0)
    verdict = "recognised" if int(guess) == label else f"taken for {class_names[int(guess)]}"
    return f"{class_names[label]}\n{verdict}, {100 * float(confidence):.0f} %"


def patches_sheet(model: nn.Module, points: Tensor, captions: Sequence[str], title: str) -> CloudSheet:
    """Show the groups of points of a model: one colour for each group, its centre large, other points grey.

    Groups overlap. A point in several groups has the colour of the group with the nearest centre.

    Args:
        model: see `group_of_points`; its weights do not matter.
        points: (n, N, C), z up.
        captions: one for each cloud; the number of points in groups is added.
        title: of the sheet.

    Raises:
        InputError: the model has no groups.

    Example:
        >>> from s2d3d import create_model
        >>> model = create_model("point_bert_tiny", num_classes=2, num_group=4, group_size=8)
        >>> len(patches_sheet(model, torch.rand(1, 64, 3), ["noise"], "groups").clouds[0])
        68
    """
    group, centers = group_of_points(model, points)
    palette = group_colors(centers.shape[1])
    clouds, colors, scales, texts = [], [], [], []
    for cloud, own, middle, caption in zip(points, group.numpy(), centers, captions):
        clouds.append(torch.cat([cloud[:, :3], middle]))
        of_points = np.where(own[:, None] >= 0, palette[own], GREY)
        colors.append(np.concatenate([of_points, 0.55 * palette]))
        scales.append(_scales(len(cloud), len(middle)))
        texts.append(f"{caption}\n{int((own >= 0).sum())} of {len(own)} points in groups")
    return CloudSheet(clouds, texts, title, colors, scales)


def group_of_points(model: nn.Module, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return the group of each point, for a model that divides clouds into groups.

    Args:
        model: a model with a method `find_groups(points)`, such as `PointBERT`.
        points: (B, N, C).

    Returns:
        (B, N) int64, the group of each point: -1 without a group, and the one with the nearest centre if there are
        several; and the centres (B, G, 3).

    Raises:
        InputError: the model has no groups.
    """
    find_groups = getattr(model, "find_groups", None)
    if find_groups is None:
        raise InputError(f"{type(model).__name__} has no groups to draw; patches need a Point-BERT or Point-MAE model")
    members, centers = find_groups(points)  # (B, G, S)
    distance = _distances(centers, points[..., :3])  # (B, G, N)
    outside = torch.ones_like(distance, dtype=torch.bool).scatter_(2, members, False)
    nearest = distance.masked_fill(outside, torch.inf).min(1)
    return nearest.indices.masked_fill(nearest.values.isinf(), -1), centers


def group_colors(count: int) -> NDArray[np.float64]:
    """Return (count, 3) colours; neighbours in the list differ strongly.

    Farthest point sampling places successive centres far from each other, but any two groups may touch.
    """
    hues = 0.61803398875 * np.arange(count) % 1
    return colormaps["hsv"](hues)[:, :3] * np.where(np.arange(count)[:, None] % 2, 0.75, 1.0)


def experts_sheet(points: Tensor, passes: Sequence[TokenExperts], captions: Sequence[str], title: str) -> CloudSheet:
    """Show the expert of each token: a row for each cloud, a column for each pass.

    The large balls are the tokens' positions; a point has the colour of the nearest token. Dropped tokens are black.

    Args:
        points: (n, N, 3), z up.
        passes: results of `trace_experts` for one layer and these clouds.
        captions: one for each cloud.
        title: of the sheet.

    Example:
        >>> tokens = TokenExperts("mlp", torch.tensor([[0, 1]]), torch.rand(1, 2, 3), 2)
        >>> experts_sheet(torch.rand(1, 9, 3), [tokens] * 3, ["noise"], "experts").captions[2]
        'noise, pass 3\\ntokens of expert 0, 1: 1, 1'
    """
    palette = np.array(EXPERT_COLORS)
    clouds, colors, scales, texts = [], [], [], []
    for row, (cloud, caption) in enumerate(zip(points, captions)):
        for number, tokens in enumerate(passes, 1):
            experts, positions = tokens.experts[row], tokens.positions[row]
            rgb = np.where(experts.numpy()[:, None] >= 0, palette[experts.numpy() % len(palette)], 0.0)
            nearest = _distances(cloud, positions).argmin(1).numpy()
            clouds.append(torch.cat([cloud, positions]))
            colors.append(np.concatenate([0.45 * rgb[nearest] + 0.55, rgb]))
            scales.append(_scales(len(cloud), len(positions)))
            counts = experts[experts >= 0].bincount(minlength=tokens.num_experts).tolist()
            names = "expert " + ", ".join(map(str, range(tokens.num_experts)))
            texts.append(f"{caption}, pass {number}\ntokens of {names}: {', '.join(map(str, counts))}")
    return CloudSheet(clouds, texts, title, colors, scales, columns=len(passes))


def point_saliency(model: nn.Module, points: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return the sensitivity of a class score to each point: the norm of its gradient with respect to the coordinates.

    Args:
        model: points (B, N, C) -> logits (B, num_classes), in eval mode, on the device of the points.
        points: (B, N, C).
        labels: (B,) int64, classes of the scores; default: the predicted classes.

    Returns:
        (B, N), at least 0, in logits per unit of length.

    Source: Simonyan et al. 2013, "Deep Inside Convolutional Networks", arXiv 1312.6034, section 3. It uses the
    maximum over colour channels; this function uses the norm of the vector.

    Example:
        >>> head = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        >>> point_saliency(head, torch.rand(5, 4, 3)).shape
        torch.Size([5, 4])
    """
    points = points.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        logits = model(points)
        chosen = logits.argmax(1) if labels is None else labels.to(logits.device)
        score = logits.gather(1, chosen[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, points)
    return gradient[..., :3].norm(dim=2)


def saliency_sheet(
    points: Tensor, saliency: Tensor, captions: Sequence[str], title: str, marks: Sequence[str | None] | None = None
) -> CloudSheet:
    """Show the saliency of points from dark to light; salient points are also larger. Each cloud has its own scale.

    Args:
        points: (n, N, 3), z up.
        saliency: (n, N), at least 0, result of `point_saliency`.
        captions: one for each cloud.
        title: of the sheet.
        marks: see `CloudSheet`.
    """
    colors, scales = [], []
    for values in saliency.double().cpu():
        # A few points at the rim of a group are much larger than all others: the scale ends at the 98th percentile.
        level = (values / values.quantile(0.98).clamp_min(1e-30)).clamp(max=1).numpy()
        colors.append(colormaps["inferno"](0.05 + 0.85 * level)[:, :3])
        scales.append(0.7 + 0.8 * level)
    return CloudSheet(points, captions, title, colors, scales, marks)


RECONSTRUCTED = (0.0, 0.447, 0.698)
"""Colour of predicted and of hidden points."""


def reconstructions_sheet(
    points: Tensor, visible: Tensor, rebuilt: Tensor, hidden: Tensor, captions: Sequence[str], title: str
) -> CloudSheet:
    """Show what a masked autoencoder does: a row of four pictures for each cloud.

    They are the input, the points of the visible groups, these in grey with the predicted points, and these in grey
    with the true points of the masked groups.

    Args:
        points: (n, N, 3), z up.
        visible: (n, V, 3).
        rebuilt: (n, M, 3), the predicted points.
        hidden: (n, M, 3), the true points.
        captions: one for each cloud.
        title: of the sheet.

    Example:
        >>> clouds = torch.rand(4, 1, 8, 3)
        >>> reconstructions_sheet(*clouds, ["noise"], "title").captions
        ['noise\\ninput', 'noise\\nmasked', 'noise\\nreconstructed', 'noise\\noriginal']
    """
    clouds, texts, colors = [], [], []
    for cloud, seen, made, true, caption in zip(points, visible, rebuilt, hidden, captions):
        shades = np.repeat([GREY, RECONSTRUCTED], [len(seen), len(made)], axis=0)
        clouds += [cloud, seen, torch.cat([seen, made]), torch.cat([seen, true])]
        colors += [None, None, shades, shades]
        texts += [f"{caption}\n{step}" for step in ("input", "masked", "reconstructed", "original")]
    return CloudSheet(clouds, texts, title, colors, columns=4)


def corruptions_sheet(
    points: Tensor,
    captions: Sequence[str],
    severity: int,
    title: str,
    *,
    seed: int,
    indices: Sequence[int],
    channels: str = XYZ,
    classify: Callable[[Tensor, int], tuple[str, bool]] | None = None,
) -> CloudSheet:
    """Show clouds unchanged and under each corruption: a row for each cloud.

    Args:
        points: (n, N, C), z up, unit sphere.
        captions: one for each cloud.
        severity: 1 (mild) to 5.
        title: of the sheet.
        seed: of the corrupted clouds.
        indices: numbers of the clouds in their set, so that the corrupted clouds are the same as in an evaluation.
        channels: of a point; the coordinates are drawn.
        classify: takes a cloud (M, C) and its row; returns a second line for its caption and whether it is right.

    Raises:
        InputError: the severity is outside 1 .. 5.

    Example:
        >>> corruptions_sheet(torch.rand(1, 64, 3), ["noise"], 3, "title", seed=0, indices=[0]).captions[2]
        'noise, jitter'
    """
    if severity not in SEVERITIES:
        raise InputError(f"severity is {severity}, must be 1 .. {SEVERITIES[-1]}")
    clouds, texts, marks = [], [], []
    for row, (cloud, caption, index) in enumerate(zip(points, captions, indices)):
        for change in (None, *CORRUPTIONS):
            changed = cloud
            if change is not None:
                changed = corrupt(cloud, change, severity, seed=seed, index=index, channels=channels)
            text, mark = f"{caption}, {change or 'as it is'}", None
            if classify:
                verdict, right = classify(changed, row)
                text, mark = f"{text}\n{verdict}", None if right else WRONG
            clouds.append(changed[:, :3])
            texts.append(text)
            marks.append(mark)
    return CloudSheet(clouds, texts, title, marks=marks, columns=len(CORRUPTIONS) + 1)


def _distances(first: Tensor, second: Tensor) -> Tensor:
    # The default for large sets uses a matrix product, which has an error of 1e-3 for near points.
    return torch.cdist(first, second, compute_mode="donot_use_mm_for_euclid_dist")


def _scales(num_points: int, num_centers: int) -> NDArray[np.float64]:
    return np.repeat([1.0, CENTER_SCALE], [num_points, num_centers])
