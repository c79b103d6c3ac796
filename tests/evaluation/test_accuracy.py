"""Evaluation against counts made by hand; BatchNorm statistics against the closed form."""

import math

import pytest
import torch
from torch import nn

from s2d3d import evaluate, recalibrate_batchnorm_
from s2d3d.datasets import BatchLoader, PointCloudDataset, build_augmentation
from s2d3d.errors import InputError
from s2d3d.evaluation.accuracy import confusion_matrix
from s2d3d.evaluation.batchnorm import batchnorms_behind


class Table(nn.Module):
    """Reads its logits from the first point of each cloud: the caller decides what the model says."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.modes = []

    def forward(self, points):
        self.modes.append((self.training, self.dropout.training))
        return self.dropout(points[:, 0])


def batches(logits, labels, size=2):
    """Clouds of one point that hold the logits, in batches."""
    points, labels = torch.tensor(logits, dtype=torch.float32).unsqueeze(1), torch.tensor(labels)
    return list(zip(points.split(size), labels.split(size)))


SAID = [[9, 0, 0], [0, 9, 0], [0, 9, 0], [9, 0, 0], [0, 0, 9]]
TRUE = [0, 0, 1, 1, 1]
"""Classes 0 and 1 have two and three samples; class 2 has none, and is said once."""


def test_counts_by_hand():
    report = evaluate(Table(), batches(SAID, TRUE), device="cpu", class_names=["bowl", "cup", "vase"], progress=False)
    assert report.confusion == [[1, 1, 0], [1, 1, 1], [0, 0, 0]]
    assert report.oa == 2 / 5
    assert report.macc == (1 / 2 + 1 / 3) / 2, "over the classes that occur"
    assert report.per_class == {"bowl": 1 / 2, "cup": 1 / 3, "vase": None}
    right, wrong = (-math.log(math.exp(logit) / (math.exp(9) + 2)) for logit in (9, 0))
    assert report.loss == pytest.approx((2 * right + 3 * wrong) / 5, rel=1e-6)
    assert (report.num_samples, report.votes, report.class_names) == (5, 1, ["bowl", "cup", "vase"])


def test_each_sample_is_marked_in_the_order_of_the_set():
    report = evaluate(Table(), batches(SAID, TRUE), device="cpu", class_names=["bowl", "cup", "vase"], progress=False)
    assert report.correct == "".join("01"[said[true] == 9] for said, true in zip(SAID, TRUE)) == "10100"


def test_marks_of_several_ranks_are_put_back_in_order(monkeypatch):
    """Each rank has a part of every batch; the others' parts are what they would have sent."""
    import torch.distributed as dist

    torch.manual_seed(0)
    labels = torch.randint(0, 3, (11,))
    points = torch.randn(11, 4, 3)
    dataset = PointCloudDataset(points, labels, ["a", "b", "c"], num_points=4, split="test", normalize=False)
    whole = evaluate(Table(), BatchLoader(dataset, 4), device="cpu", progress=False)
    sent = []

    def gather(everyone, own):
        sent.append(own)
        everyone[:] = [*sent, *[[]] * (3 - len(sent))]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    for rank in range(3):
        loader = BatchLoader(dataset, 6, rank=rank, world_size=3)
        report = evaluate(Table(), loader, device="cpu", progress=False)
    assert report.correct == whole.correct and len(set(whole.correct)) == 2


def test_table_and_summary():
    report = evaluate(Table(), batches(SAID, TRUE), device="cpu", class_names=["bowl", "cup", "vase"], progress=False)
    assert [line.split() for line in report.table().splitlines()[1:]] == [
        ["bowl", "2", "1", "50.0", "%", "cup", "(1)"],
        ["cup", "3", "1", "33.3", "%", "bowl", "(1)"],
        ["vase", "0", "0", "-"],
    ]
    assert report.summary() == "OA 40.00 %, mAcc 41.67 % (5 samples)"


def test_confusions_of_few_classes_are_the_matrix():
    report = evaluate(Table(), batches(SAID, TRUE), device="cpu", class_names=["bowl", "cup", "vase"], progress=False)
    head, numbers, *rows = report.confusions().splitlines()
    assert head == "confusion counts, rows: true class, columns: predicted class" and numbers.split() == ["1", "2", "3"]
    assert [row.split() for row in rows] == [
        ["1", "bowl", "1", "1", "."], ["2", "cup", "1", "1", "1"], ["3", "vase", ".", ".", "."],
    ]  # fmt: skip
    assert len({len(line) for line in (numbers, *rows)}) == 1, "columns stand below each other"


def test_confusions_of_many_classes_are_the_most_frequent():
    names = [f"class_{index}" for index in range(30)]
    labels = [0] * 6 + [1] * 3 + list(range(2, 16))
    said = [5, 5, 5, 0, 0, 7] + [0, 0, 1] + [16] * 14
    report = evaluate(
        Table(), batches(torch.eye(30)[said].tolist(), labels), device="cpu", class_names=names, progress=False
    )
    lines = report.confusions().splitlines()
    assert lines[0] == "most frequent confusions (10 of 17)" and len(lines) == 11
    assert [line.split() for line in lines[1:4]] == [
        ["3", "of", "6", "class_0", "taken", "for", "class_5"],
        ["2", "of", "3", "class_1", "taken", "for", "class_0"],
        ["1", "of", "6", "class_0", "taken", "for", "class_7"],
    ]
    right = evaluate(
        Table(), batches(torch.eye(30).tolist(), list(range(30))), device="cpu", class_names=names, progress=False
    )
    assert right.confusions() == "most frequent confusions (0 of 0)"


def test_table_of_one_class():
    report = evaluate(Table(), batches([[1.0]], [0]), device="cpu", progress=False)
    assert report.table().splitlines()[1].split() == ["0", "1", "1", "100.0", "%"] and report.oa == 1


def test_mode_is_restored_and_evaluation_runs_in_eval_mode():
    for training in (True, False):
        model = Table().train(training)
        model.dropout.train(training)
        evaluate(model, batches(SAID, TRUE), device="cpu", progress=False)
        assert model.modes == [(False, False)] * 3
        assert model.training == model.dropout.training == training


def test_mode_is_restored_after_an_error():
    def failing():
        yield from batches(SAID, TRUE)[:1]
        raise OSError("the disk is gone")

    model = Table().train()
    with pytest.raises(OSError, match="the disk is gone"):
        evaluate(model, failing(), device="cpu", progress=False)
    assert model.training


def test_no_gradient_is_kept():
    class Grads(Table):
        def forward(self, points):
            assert not torch.is_grad_enabled()
            return super().forward(points)

    evaluate(Grads(), batches(SAID, TRUE), device="cpu", progress=False)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("seed", range(3))
def test_confusion_matrix_equals_a_loop(seed):
    torch.manual_seed(seed)
    labels, predicted = torch.randint(0, 7, (200,)), torch.randint(0, 7, (200,))
    counts = [[0] * 8 for _ in range(8)]
    for true, said in zip(labels.tolist(), predicted.tolist()):
        counts[true][said] += 1
    assert confusion_matrix(predicted, labels, 8).tolist() == counts


def test_batches_do_not_matter():
    torch.manual_seed(0)
    logits, labels = torch.randn(11, 3).tolist(), torch.randint(0, 3, (11,)).tolist()
    whole, parts = (
        evaluate(Table(), batches(logits, labels, size), device="cpu", progress=False).to_dict() for size in (11, 4)
    )
    assert whole.pop("loss") == pytest.approx(parts.pop("loss"), rel=1e-12)
    assert whole == parts


def test_class_names_come_from_the_argument_the_data_set_or_are_numbers():
    dataset = PointCloudDataset(
        torch.rand(4, 8, 3), torch.tensor([0, 1, 2, 0]), ["a", "b", "c"], num_points=8, split="test"
    )
    loader = BatchLoader(dataset, 2)
    assert evaluate(Table(), loader, device="cpu", progress=False).class_names == ["a", "b", "c"]
    named = evaluate(Table(), loader, device="cpu", progress=False, class_names=["x", "y", "z"])
    assert named.class_names == ["x", "y", "z"]
    assert evaluate(Table(), batches(SAID, TRUE), device="cpu", progress=False).class_names == ["0", "1", "2"]


def test_votes_are_the_mean_of_logits_over_seeded_passes():
    dataset = PointCloudDataset(
        torch.rand(6, 8, 3),
        torch.tensor([0, 1, 2, 0, 1, 2]),
        ["a", "b", "c"],
        num_points=8,
        split="test",
        normalize=False,
    )
    loader = BatchLoader(dataset, 4, augment=build_augmentation(scale=(0.5, 2.0), shift=0.5))
    passes = [torch.cat([points[:, 0] for points, _ in loader.vote(vote)]) for vote in range(3)]
    assert torch.equal(passes[0], torch.cat([points[:, 0] for points, _ in loader])), "vote 0 is the plain pass"
    assert not torch.equal(passes[1], passes[2])
    report = evaluate(Table(), loader, device="cpu", votes=3, progress=False)
    mean = torch.stack(passes).mean(0)
    assert report.confusion == confusion_matrix(mean.argmax(1), dataset.labels, 3).tolist()
    assert report.loss == pytest.approx(float(nn.functional.cross_entropy(mean.double(), dataset.labels)), rel=1e-6)
    assert report.votes == 3 and "3 votes" in report.summary()
    assert evaluate(Table(), loader, device="cpu", votes=3, progress=False) == report


def test_a_data_set_is_evaluated_in_its_order_without_its_augmentation():
    points = torch.tensor(SAID * 20, dtype=torch.float32)[:, None].repeat(1, 4, 1)
    labels = torch.tensor(TRUE * 20)

    def spoil(points, generator):
        return -points

    reports = []
    for split in ("train", "test"):
        transform = spoil if split == "train" else None
        data = PointCloudDataset(
            points, labels, ["a", "b", "c"], split=split, num_points=4, normalize=False, transform=transform
        )
        reports.append(evaluate(Table(), data, progress=False))
    plain = evaluate(Table(), torch.utils.data.TensorDataset(points, labels), progress=False, class_names=[*"abc"])
    by_hand = evaluate(Table(), batches(SAID * 20, TRUE * 20), device="cpu", class_names=[*"abc"], progress=False)
    assert reports == [by_hand, by_hand] and plain == by_hand and by_hand.num_samples == 100
    model = Table()
    evaluate(model, data, votes=3, progress=False)
    assert len(model.modes) == 6, "two batches, three times"


def test_the_device_is_that_of_the_model():
    class Where(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, device="meta"))

        def forward(self, points):
            raise RuntimeError(f"computes on {points.device}")

    with pytest.raises(RuntimeError, match="computes on meta"):
        evaluate(Where(), batches(SAID, TRUE), progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(votes=0), "votes is 0, must be at least 1"),
        (dict(votes=-1), "votes is -1, must be at least 1"),
        (dict(votes=2), "votes is 2, but a list cannot repeat a pass with other points; use BatchLoader"),
        (dict(class_names=["a", "b"]), "the model has 3 classes, the data 2"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        evaluate(Table(), batches(SAID, TRUE), device="cpu", progress=False, **arguments)


def test_no_batch():
    with pytest.raises(InputError, match=r"^the loader yields no batch to evaluate$"):
        evaluate(Table(), [], device="cpu")


@pytest.mark.parametrize("label", [3, -1, 7])
def test_labels_that_are_no_classes(label):
    with pytest.raises(InputError, match=rf"^sample 3 has label {label}, must be in \[0, 3\)$"):
        evaluate(Table(), batches(SAID, [0, 0, 1, label, 1]), device="cpu", progress=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite(value):
    logits = [*SAID[:4], [0, value, 0]]
    with pytest.raises(
        InputError, match=r"^the model's output is not finite for 1 of 5 samples; its training has diverged"
    ):
        evaluate(Table(), batches(logits, TRUE), device="cpu", progress=False)


# BatchNorm


class Norms(nn.Module):
    """A BatchNorm behind a fixed layer, one behind dropout, and a LayerNorm, which has no statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm1 = nn.BatchNorm1d(4, momentum=0.3)
        self.dropout = nn.Dropout(0.5)
        self.norm2 = nn.BatchNorm1d(4, momentum=0.2)
        self.last = nn.LayerNorm(4)

    def forward(self, points):
        return self.last(self.norm2(self.dropout(self.norm1(self.first(points[:, 0])))))


def clouds(*sizes):
    return [(torch.randn(size, 1, 3) * 2 + 1, torch.zeros(size, dtype=torch.int64)) for size in sizes]


def test_statistics_are_the_mean_over_batches():
    model, loader = Norms(), clouds(6, 6, 4)
    model.norm1.running_mean.fill_(7)
    assert recalibrate_batchnorm_(model, loader) == 2
    inputs = [model.first(points[:, 0]).detach() for points, _ in loader]
    means = torch.stack([x.mean(0) for x in inputs])
    variances = torch.stack([x.var(0, unbiased=True) for x in inputs])
    torch.testing.assert_close(model.norm1.running_mean, means.mean(0))
    torch.testing.assert_close(model.norm1.running_var, variances.mean(0))
    # The second sees the first's outputs by the statistics of the batch, and no dropout.
    outputs = [nn.functional.batch_norm(x, None, None, training=True) for x in inputs]
    second = torch.stack([x.var(0, unbiased=True) for x in outputs]).mean(0)
    torch.testing.assert_close(model.norm2.running_var, second)
    torch.testing.assert_close(model.norm2.running_mean, torch.zeros(4), atol=1e-6, rtol=0)
    assert model.norm1.num_batches_tracked == 3


@pytest.mark.parametrize("training", [True, False])
def test_nothing_but_the_statistics_changes(training):
    model = Norms().train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    recalibrate_batchnorm_(model, clouds(5))
    assert all(module.training == training for module in model.modules())
    assert (model.norm1.momentum, model.norm2.momentum) == (0.3, 0.2)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == ("running" not in key and "num_batches" not in key), key


def test_chosen_layers_alone():
    model = Norms()
    before = model.norm1.running_mean.clone(), model.norm1.running_var.clone()
    assert recalibrate_batchnorm_(model, clouds(5), layers=[model.norm2]) == 1
    assert torch.equal(model.norm1.running_mean, before[0]) and torch.equal(model.norm1.running_var, before[1])
    assert not torch.equal(model.norm2.running_var, torch.ones(4))


def test_a_model_without_batchnorm_reads_no_data():
    def unread():
        raise AssertionError("read")
        yield

    assert recalibrate_batchnorm_(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), unread()) == 0
    assert recalibrate_batchnorm_(nn.BatchNorm1d(3, track_running_stats=False), unread()) == 0


def test_an_error_leaves_the_statistics_as_they_were():
    def failing():
        yield from clouds(5)
        raise OSError("the disk is gone")

    model = Norms()
    recalibrate_batchnorm_(model, clouds(8, 8))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"^the loader yields no batch to re-estimate BatchNorm statistics from$"):
        recalibrate_batchnorm_(model, [])
    with pytest.raises(OSError, match="the disk is gone"):
        recalibrate_batchnorm_(model, failing())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert model.norm1.momentum == 0.3 and model.training


def test_batchnorms_behind_a_module():
    model = Norms()
    assert batchnorms_behind(model, "first") == [model.norm1, model.norm2]
    assert batchnorms_behind(model, "dropout") == [model.norm2]
    assert batchnorms_behind(model, "last") == []
