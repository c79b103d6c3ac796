"""What each kind of sheet shows: groups, experts, saliency and corruptions against independent computations."""

import numpy as np
import pytest
import torch
from torch import nn

from s2d3d import create_model
from s2d3d.datasets.corruptions import CORRUPTIONS, corrupt
from s2d3d.errors import InputError
from s2d3d.ops.points import group_points
from s2d3d.viz.cloud_sheets import (
    CENTER_SCALE,
    EXPERT_COLORS,
    GREY,
    WRONG,
    by_mistake,
    corruptions_sheet,
    experts_sheet,
    gallery_sheet,
    group_of_points,
    patches_sheet,
    point_saliency,
    predictions_sheet,
    saliency_sheet,
)
from s2d3d.viz.tokens import TokenExperts

POINTS = torch.rand(2, 128, 3, generator=torch.Generator().manual_seed(3)) - 0.5


@pytest.fixture
def model():
    return create_model(
        "point_bert_tiny", num_classes=3, trans_dim=16, depth=1, num_heads=2, num_group=6, group_size=16,
        encoder_dims=16, encoder_width=8,
    ).eval()  # fmt: skip


def members(model):
    """For each cloud the (centre, set of points) of its groups, from the groups that the model itself makes."""
    groups, centers = group_points(POINTS, model.num_group, model.group_size, skip_origin=model.fps_skip_origin)
    places = (groups + centers.unsqueeze(2)).unsqueeze(3)
    index = (places - POINTS[:, None, None]).square().sum(-1).argmin(-1)
    return [[(middle, set(own.tolist())) for middle, own in zip(*cloud)] for cloud in zip(centers, index)]


def test_points_belong_to_the_nearest_group_that_holds_them(model):
    group, _ = group_of_points(model, POINTS)
    shared = 0
    for cloud, own, groups in zip(POINTS, group, members(model)):
        for number, point in enumerate(cloud):
            holding = [g for g, (_, inside) in enumerate(groups) if number in inside]
            shared += len(holding) > 1
            nearest = min(holding, key=lambda g: float((groups[g][0] - point).norm())) if holding else -1
            assert own[number] == nearest
    assert shared > 3 and (group == -1).sum() > 3, "groups overlap, and some points are in none"


def test_patches_have_a_colour_each_large_centres_and_grey_elsewhere(model):
    sheet = patches_sheet(model, POINTS, ["a", "b"], "groups")
    group, centers = group_of_points(model, POINTS)
    for index in range(2):
        assert torch.equal(sheet.clouds[index], torch.cat([POINTS[index], centers[index]]))
        assert sheet.scales[index].tolist() == [1.0] * 128 + [CENTER_SCALE] * 6
        colors = sheet.colors[index][:128]
        assert (colors[group[index] == -1] == GREY).all()
        of_groups = [np.unique(colors[group[index] == number], axis=0) for number in range(6)]
        assert all(len(own) == 1 for own in of_groups) and len(np.unique(np.concatenate(of_groups), axis=0)) == 6
        assert sheet.captions[index] == f"{'ab'[index]}\n{int((group[index] >= 0).sum())} of 128 points in groups"
    with pytest.raises(InputError, match="Linear has no groups to draw"):
        patches_sheet(nn.Linear(3, 3), POINTS, ["a", "b"], "groups")


def test_experts_are_a_row_for_each_cloud_and_a_column_for_each_pass():
    generator = torch.Generator().manual_seed(1)
    positions = POINTS[:, :10]
    passes = [TokenExperts("mlp", torch.randint(-1, 3, (2, 10), generator=generator), positions, 3) for _ in range(2)]
    sheet = experts_sheet(POINTS, passes, ["a", "b"], "experts")
    assert sheet.columns == 2 and len(sheet.clouds) == 4
    assert [caption.splitlines()[0] for caption in sheet.captions] == [
        "a, pass 1",
        "a, pass 2",
        "b, pass 1",
        "b, pass 2",
    ]
    for place in range(4):
        row, number = divmod(place, 2)
        experts = passes[number].experts[row].tolist()
        counts = ", ".join(str(experts.count(expert)) for expert in range(3))
        assert sheet.captions[place].endswith(f"tokens of expert 0, 1, 2: {counts}")
        expected = [EXPERT_COLORS[expert] if expert >= 0 else (0, 0, 0) for expert in experts]
        assert sheet.colors[place][128:] == pytest.approx(np.array(expected))
        for point, color in zip(POINTS[row], sheet.colors[place]):
            nearest = int((positions[row] - point).norm(dim=1).argmin())
            assert color == pytest.approx(0.45 * np.array(expected[nearest]) + 0.55), "a pale form of its token's"


class Quadratic(nn.Module):
    """Class 0 has the score sum_i w_i |p_i|^2, whose gradient by p_i is 2 w_i p_i; class 1 a small constant one."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.linspace(0.1, 2, 128))

    def forward(self, points):
        square = (self.w * points.square().sum(2)).sum(1)
        return torch.stack([square, 0 * square - 1 + points[:, 3, 0]], 1)


def test_saliency_is_the_length_of_the_gradient():
    model = Quadratic()
    with torch.no_grad():  # as in a tool that otherwise needs no gradients
        of_best = point_saliency(model, POINTS)
        of_other = point_saliency(model, POINTS, torch.tensor([1, 1]))
    assert torch.allclose(of_best, 2 * model.w.detach() * POINTS.norm(dim=2), rtol=1e-5)
    assert of_other[:, 3].tolist() == [1, 1] and of_other.sum() == 2
    assert model.w.grad is None and not POINTS.requires_grad


def test_points_in_no_group_do_not_matter_to_point_bert(model):
    saliency = point_saliency(model, POINTS)
    group, _ = group_of_points(model, POINTS)
    assert (saliency[group == -1] == 0).all() and (saliency[group >= 0] > 0).float().mean() > 0.3, (
        "a maximum over each group"
    )


def test_salient_points_are_lighter_and_larger():
    values = torch.arange(100.0).expand(2, 100)
    sheet = saliency_sheet(POINTS[:, :100], values * torch.tensor([[1.0], [1000.0]]), ["a", "b"], "gradient")
    assert np.allclose(sheet.colors[0], sheet.colors[1]), "each cloud has its own scale"
    light = sheet.colors[0].sum(1)
    assert (np.diff(light[:98]) > 0).all() and (np.diff(sheet.scales[0][:98]) > 0).all()
    flat = saliency_sheet(POINTS[:, :100], torch.zeros(2, 100), ["a", "b"], "gradient")
    assert len(np.unique(flat.colors[0], axis=0)) == 1


def test_corruptions_are_those_of_an_evaluation():
    def classify(cloud, row):
        return f"{len(cloud)} points of row {row}", len(cloud) == 128

    sheet = corruptions_sheet(POINTS, ["a", "b"], 4, "four", seed=0, indices=[5, 9], classify=classify)
    assert sheet.columns == 8 and len(sheet.clouds) == 16
    for row, index in enumerate((5, 9)):
        for place, name in enumerate((None, *CORRUPTIONS)):
            cloud, caption = sheet.clouds[8 * row + place], sheet.captions[8 * row + place]
            expected = POINTS[row] if name is None else corrupt(POINTS[row], name, 4, seed=0, index=index)
            assert torch.equal(cloud, expected)
            assert caption == f"{'ab'[row]}, {name or 'as it is'}\n{len(expected)} points of row {row}"
            assert sheet.marks[8 * row + place] == (None if len(expected) == 128 else WRONG)
    assert corruptions_sheet(POINTS, ["a", "b"], 1, "one", seed=0, indices=[0, 1]).marks == [None] * 16
    for severity in (0, 6):
        with pytest.raises(InputError, match=f"severity is {severity}, must be 1 .. 5"):
            corruptions_sheet(POINTS, ["a", "b"], severity, "bad", seed=0, indices=[0, 1])


def test_mistakes_come_first_then_the_least_likely_truth():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(50, 4, generator=generator).mul(4).softmax(1)
    labels = torch.randint(4, (50,), generator=generator)
    rows = list(zip(probabilities.tolist(), labels.tolist()))
    wanted = sorted(range(50), key=lambda i: (max(rows[i][0]) == rows[i][0][rows[i][1]], rows[i][0][rows[i][1]]))
    assert by_mistake(probabilities, labels).tolist() == wanted


def test_predictions_and_galleries_say_what_they_show():
    probabilities = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    sheet = predictions_sheet(POINTS, torch.tensor([0, 0]), probabilities, ["box", "mug"], "two")
    assert sheet.captions == ["box\ntaken for mug, 80 %", "box\nrecognised, 70 %"] and sheet.marks == [WRONG, None]
    assert torch.equal(sheet.clouds, POINTS.flip(0)) and sheet.title.startswith("1 of 2 clouds recognised\n")
    gallery = gallery_sheet(POINTS, torch.tensor([1, 0]), ["box", "mug"], "both")
    assert gallery.captions == ["box", "mug"] and torch.equal(gallery.clouds, POINTS.flip(0)) and gallery.colors is None
    colors = torch.rand(POINTS.shape)
    gallery = gallery_sheet(POINTS, torch.tensor([1, 0]), ["box", "mug"], "both", colors)
    assert torch.equal(torch.stack(gallery.colors), colors.flip(0))
