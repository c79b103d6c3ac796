"""Sparse-to-Dense training of a stock timm vision transformer on handwritten digits, compared with its dense baseline.

Under a minute on one core:

    python examples/timm_vit_s2d.py

The digits come with scikit-learn. One seed and 360 test images: this shows how it is done, not which of the two is
better.
"""

import argparse
import copy
import sys
from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from s2d3d import EWA, MoFConfig, convert_to_mof_, merge_experts


def build_model() -> VisionTransformer:
    """A vision transformer for 8 x 8 gray images: 4 patches and a class token, 10 classes."""
    return VisionTransformer(img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4)


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (1437, 1, 8, 8) float32 in [-1, 1] and labels (1437,), test images and labels (360)."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return images[order[360:]], labels[order[360:]], images[order[:360]], labels[order[:360]]


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int, ewa: EWA | None = None) -> None:
    """Train in place; the only line that knows of experts is `ewa.step()`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(labels), (64,))
        loss = F.cross_entropy(model(images[batch]), labels[batch], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if ewa:
            ewa.step()  # 2. after every optimizer step, pull the experts towards their mean


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model.eval()(images).argmax(1) == labels).float().mean())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=300, help="optimizer steps of each training (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default: %(default)s)")
    arguments = parser.parse_args(argv)
    train_images, train_labels, test_images, test_labels = load_data()

    torch.manual_seed(arguments.seed)
    dense = build_model()
    sparse = copy.deepcopy(dense)  # both start from the same weights
    names = convert_to_mof_(sparse, MoFConfig(num_experts=4, targets=("*.mlp",), every=2))  # 1. before the optimizer
    print(f"experts in {', '.join(names)}")

    torch.manual_seed(arguments.seed)
    train(dense, train_images, train_labels, arguments.steps)
    torch.manual_seed(arguments.seed)
    ewa = EWA(sparse, share_rate=0.3, total_steps=arguments.steps)
    train(sparse, train_images, train_labels, arguments.steps, ewa)
    before = accuracy(sparse, test_images, test_labels)
    merged = merge_experts(sparse)  # 3. at the end, dense again

    stock = build_model()
    stock.load_state_dict(merged.state_dict(), strict=True)  # the class that timm ships, no trace of experts
    for title, value in (
        ("dense baseline", accuracy(dense, test_images, test_labels)),
        ("S2D before merge", before),
        ("S2D merged", accuracy(stock, test_images, test_labels)),
    ):
        print(f"{title:<26}{100 * value:6.2f} % of {len(test_labels)} test images")
    for title, model in (("while training", sparse), ("after", stock)):
        print(f"{'parameters ' + title:<26}{sum(p.numel() for p in model.parameters()):,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
