"""Clouds that are no shapes, and arithmetic of lower precision."""

import copy
import math

import pytest
import torch
from cases import quick

from s2d3d import MoFConfig, convert_to_mof_, create_model, list_models
from s2d3d.datasets import PointCloudDataset

NUM_POINTS = 64
SMALLER = {
    "point_bert": dict(depth=2, trans_dim=96, encoder_width=32),
    "point_mae": dict(depth=2, trans_dim=96, encoder_dims=96, encoder_width=32),
    "point_bert_small": dict(depth=2),
    "point_transformer": dict(depths=(0, 1, 1, 1, 1)),
}
"""The published sizes, made small enough for a test; every layer that treats points is kept."""


def build(name: str, sparse: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, **SMALLER.get(name, {}))
    if sparse:
        convert_to_mof_(model, MoFConfig(num_experts=2))
    return model


def clouds() -> dict[str, torch.Tensor]:
    """Return batches of two clouds by what is wrong with them."""
    torch.manual_seed(1)
    shape = torch.nn.functional.normalize(torch.randn(2, NUM_POINTS, 3), dim=-1)
    return {
        "all points equal": torch.full((2, NUM_POINTS, 3), 0.3),
        "all points zero": torch.zeros(2, NUM_POINTS, 3),
        "each point eight times": shape[:, : NUM_POINTS // 8].repeat(1, 8, 1),
        "two different points": torch.cat([shape[:, :1], shape[:, 1:2].expand(2, NUM_POINTS - 1, 3)], dim=1),
        "on a line": shape[:, :, :1] * torch.ones(3),
        "scale 1e6": shape * 1e6,
        "scale 1e-6": shape * 1e-6,
        "far from the origin": shape + 1e4,
        "one of the two is a point": torch.cat([shape[:1], torch.zeros(1, NUM_POINTS, 3)]),
    }


WITHOUT_VARIATION = ("all points equal", "all points zero")
"""Every row that BatchNorm sees is the same: each layer of it multiplies the gradient by up to 1 / sqrt(eps) = 316."""


TINY_FIRST = sorted(list_models(task="classify"), key=lambda name: not name.endswith("_tiny"))


@pytest.mark.parametrize("name", quick(2, TINY_FIRST))
def test_degenerate_clouds_give_finite_outputs_and_gradients(name):
    """Gradients of whole batches without variation may overflow behind many BatchNorm layers; a training names them."""
    built = build(name, sparse=True)
    for what, points in clouds().items():
        model = copy.deepcopy(built)  # BatchNorm statistics of its own
        for training in (True, False):
            model.train(training).zero_grad()
            logits = model(points)
            assert logits.shape == (2, 5) and logits.isfinite().all(), (what, training)
            torch.nn.functional.cross_entropy(logits, torch.tensor([0, 3])).backward()
            gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
            assert any(gradient.any() for gradient in gradients.values()), (what, training)
            if what not in WITHOUT_VARIATION or name.startswith("point_bert") or not training:
                assert all(gradient.isfinite().all() for gradient in gradients.values()), (what, training)


@pytest.mark.parametrize("name", list_models(task="classify"))
@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_points_give_finite_outputs_or_an_error_that_says_how_few(name, count):
    model = build(name).eval()
    try:
        logits = model(torch.rand(2, count, 3))
    except ValueError as error:
        assert str(count) in str(error) and "point" in str(error)
    else:
        assert logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_data_set_of_degenerate_clouds_is_finite_in_the_unit_sphere(dtype):
    """Normalised once: what is left of a cloud without extent is the origin."""
    stored = {key: points for key, points in clouds().items() if dtype == torch.float32 or points.abs().max() < 6e4}
    points = torch.cat(list(stored.values())).to(dtype)
    for num_points in (NUM_POINTS, NUM_POINTS // 2):
        dataset = PointCloudDataset(points, torch.zeros(len(points)), ["any"], num_points=num_points, split="test")
        batch, _ = dataset.batch(torch.arange(len(points)))
        assert batch.isfinite().all() and batch.norm(dim=-1).max() < 1 + 1e-2


BF16_LOGITS, BF16_GRADIENTS, COMPILED = 0.03, 0.3, 1e-4
"""Relative differences to float32, in the Euclidean norm: of logits and of all gradients under bf16, and compiled."""


def relative(tensor: torch.Tensor, reference: torch.Tensor) -> float:
    return float((tensor - reference).norm() / reference.norm())


def outputs(model, points: torch.Tensor, *, network=None, bf16: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (B, 5) and all gradients of their cross-entropy in one vector, of one partition of the tokens."""
    model.zero_grad()
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = (model if network is None else network)(points).float()
    torch.nn.functional.cross_entropy(logits, torch.arange(len(points)) % 5).backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture
def points():
    torch.manual_seed(2)
    return torch.nn.functional.normalize(torch.randn(8, NUM_POINTS, 3), dim=-1)


@pytest.mark.parametrize("name", quick(1, ["point_bert_tiny", "point_mae", "point_transformer_tiny"]))
def test_bf16_stays_within_its_tolerance_of_float32(name, points):
    model = build(name, sparse=True).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()  # statistics of 8 untrained outputs that hardly differ would magnify any difference
    logits, gradients = outputs(model, points)
    low_logits, low_gradients = outputs(model, points, bf16=True)
    assert not torch.equal(logits, low_logits), "autocast had an effect"
    assert relative(low_logits, logits) < BF16_LOGITS
    assert relative(low_gradients, gradients) < BF16_GRADIENTS
    assert math.isfinite(float(low_gradients.sum()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["point_bert_tiny", "point_transformer_tiny"])
def test_the_compiled_model_stays_within_its_tolerance_of_the_plain_one(name, points, record):
    torch.compiler.reset()
    model = build(name, sparse=True).eval()
    logits, gradients = outputs(model, points)
    compiled_logits, compiled_gradients = outputs(model, points, network=torch.compile(model))
    differences = relative(compiled_logits, logits), relative(compiled_gradients, gradients)
    failures = [f"relative difference {value:.2e}" for value in differences if not value < COMPILED]
    record(f"torch.compile of {name} against float32", 2, failures=failures, within_tolerance=2 - len(failures))
    assert not failures
