"""The linear probe against scikit-learn by hand, and features against the tokens they come from."""

import numpy as np
import pytest
import torch

from s2d3d import create_model
from s2d3d.errors import InputError
from s2d3d.evaluation.probe import FEATURES, coordinate_statistics, linear_probe, model_features

MODELS = ("point_bert_tiny", "point_transformer_tiny", "point_mae_pretrain_tiny")


def build(name):
    classes = {} if "pretrain" in name else {"num_classes": 3}
    return create_model(name, **classes)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", FEATURES)
def test_features_are_the_pooled_tokens_in_eval_mode(name, kind):
    model = build(name).train()
    points = torch.rand(5, 128, 3)
    loader = [(points[:3], torch.tensor([0, 1, 2])), (points[3:], torch.tensor([1, 0]))]
    features, labels = model_features(model, loader, device="cpu", kind=kind, progress=False)
    assert model.training and labels.tolist() == [0, 1, 2, 1, 0]
    tokens = model.eval().forward_features(points).detach()
    tokens = tokens[:, 1:] if name == "point_bert_tiny" else tokens  # without the class token
    expected = {
        "mean+max": tokens.mean(1) + tokens.max(1)[0],
        "max": tokens.max(1)[0],
        "concat": torch.cat([tokens.max(1)[0], tokens.mean(1)], 1),
    }[kind]
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


def blobs(count: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centers = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    return centers[labels] + spread * torch.randn(count, 2, generator=generator), labels


def test_probe_chooses_c_on_training_data_and_is_fitted_to_all_of_it():
    from sklearn.svm import SVC

    train, test = blobs(150, 0.4, 0), blobs(90, 0.4, 1)
    report = linear_probe(train, test, strengths=(0.001, 0.1, 10.0), progress=False)
    assert set(report.choice) == {0.001, 0.1, 10.0}
    best = max(report.choice.values())
    assert report.c == min(c for c, score in report.choice.items() if score == best)
    machine = SVC(kernel="linear", C=report.c).fit(train[0].numpy(), train[1].numpy())
    right = machine.predict(test[0].numpy()) == test[1].numpy()
    assert report.oa == pytest.approx(right.mean())
    assert report.macc == pytest.approx(np.mean([right[test[1].numpy() == label].mean() for label in range(3)]))
    assert (report.num_features, report.num_train, report.num_test) == (2, 150, 90)
    other = linear_probe(train, (test[0] * 0 + 9, test[1]), strengths=(0.001, 0.1, 10.0), progress=False)
    assert other.choice == report.choice and other.c == report.c, "the test split has no part in the choice"


def test_probe_repeats_and_the_global_generator_does_not_move_the_held_out_part():
    train, test = blobs(150, 0.8, 0), blobs(30, 0.8, 1)
    first = linear_probe(train, test, progress=False)
    torch.manual_seed(5)
    assert linear_probe(train, test, progress=False) == first


def test_a_class_that_is_predicted_and_does_not_occur_is_left_out_of_the_mean(recwarn):
    train, (features, labels) = blobs(150, 0.1, 0), blobs(30, 0.1, 1)
    counts = labels.bincount().tolist()
    report = linear_probe(train, (features, torch.where(labels == 0, 1, labels)), progress=False)
    assert report.macc == pytest.approx((counts[1] / (counts[0] + counts[1]) + 1) / 2) and not recwarn


def test_few_clouds_a_class_are_no_regression(recwarn):
    features, labels = torch.randn(30, 2), torch.tensor([0, 0, 0, *range(1, 28)])
    assert len(linear_probe((features, labels), (features, labels), progress=False).choice) == 4 and not recwarn


def test_statistics_of_coordinates_by_hand():
    cloud = torch.tensor([[[0.0, 0, 0], [2, 0, 0], [4, 0, 0]]])
    statistics = coordinate_statistics(cloud)[0]
    assert statistics.shape == (54,)
    assert statistics[:12].tolist() == pytest.approx([2, 0, 0, (8 / 3) ** 0.5, 0, 0, 0, 0, 0, 4, 0, 0])
    assert statistics[12:18].tolist() == pytest.approx([8 / 3, 0, 0, 0, 0, 0])
    assert statistics[18:27].tolist() == pytest.approx([0.4 * k for k in range(1, 10)])
    assert torch.equal(coordinate_statistics(cloud.flip(1))[0].round(decimals=5), statistics.round(decimals=5))


def test_refused():
    points = [(torch.rand(2, 64, 3), torch.tensor([0, 1]))]
    model = build("point_bert_tiny")
    with pytest.raises(InputError, match=r"features is 'cls', must be one of mean\+max, max, concat"):
        model_features(model, points, device="cpu", kind="cls")
    with pytest.raises(InputError, match="yields no batch"):
        model_features(model, [], device="cpu")
    with pytest.raises(InputError, match="Linear has no forward_features"):
        model_features(torch.nn.Linear(3, 3), points, device="cpu")
    torch.nn.init.constant_(model.norm.weight, torch.nan)
    with pytest.raises(InputError, match="features of 2 of 2 clouds are not finite"):
        model_features(model, points, device="cpu", progress=False)
    same = torch.rand(10, 2), torch.zeros(10, dtype=torch.int64)
    with pytest.raises(InputError, match="at least two classes"):
        linear_probe(same, same, progress=False)
    few = torch.rand(2, 2), torch.tensor([0, 1])
    with pytest.raises(InputError, match="2 training clouds of 2 classes are too few"):
        linear_probe(few, few, progress=False)
