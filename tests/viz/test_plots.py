"""Plots: the numbers that end up in the figure, against those given; files and SVG."""

import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from cases import quick
from matplotlib.colors import to_hex
from matplotlib.image import imread

from s2d3d.errors import InputError
from s2d3d.viz.figure import figure_svg, save_figure
from s2d3d.viz.plots import (
    class_accuracy_figure,
    confusion_figure,
    corruption_figure,
    divergence_figure,
    throughput_figure,
    training_curves,
)

DENSE = [
    {"epoch": 1, "updates": 10, "lr": 0.1, "share_rate": 0, "train_loss": 3.0, "train_oa": 0.25, "seconds": 2.0},
    {"epoch": 2, "updates": 20, "lr": 0.05, "share_rate": 0, "train_loss": 1.0, "train_oa": 0.5, "test_oa": 0.4},
    {"epoch": 3, "updates": 30, "lr": 0.0, "share_rate": 0, "train_loss": 0.5, "train_oa": 0.75, "seconds": 4.0},
]
SPARSE = [{**row, "share_rate": 0.1 * row["epoch"], "divergence": 10.0 ** -row["epoch"]} for row in DENSE[:2]]


def panel(figure, title):
    (found,) = [axes for axes in figure.axes if axes.get_title() == title]
    return found


def curve(axes, label):
    (found,) = [line for line in axes.lines if line.get_label() == label]
    return found.get_xydata().tolist()


def test_training_curves_hold_the_numbers_of_every_run():
    figure = training_curves({"dense": DENSE, "sparse": SPARSE})
    loss, accuracy = panel(figure, "Training loss"), panel(figure, "Training accuracy, with augmentation")
    assert curve(loss, "dense") == [[1, 3.0], [2, 1.0], [3, 0.5]] and curve(loss, "sparse") == [[1, 3.0], [2, 1.0]]
    assert curve(accuracy, "dense") == [[1, 25], [2, 50], [3, 75]] and accuracy.get_ylabel() == "OA, %"
    test = panel(figure, "Accuracy of evaluations during training")
    assert curve(test, "dense") == [[2, 40]], "epochs without an evaluation are left out"
    assert curve(panel(figure, "Learning rate"), "dense") == [[1, 0.1], [2, 0.05], [3, 0.0]]
    assert len({to_hex(line.get_color()) for line in loss.lines}) == 2
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["dense", "sparse"]


def test_what_was_not_measured_is_said_and_nan_is_no_point():
    figure = training_curves({"a": [{"epoch": 1, "train_loss": 2.0, "val_oa": math.nan}, {"epoch": 2}]})
    assert curve(panel(figure, "Training loss"), "a") == [[1, 2.0]]
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts == ["not measured"] * 3


def test_nine_runs_are_told_apart():
    figure = training_curves({str(index): DENSE for index in range(9)})
    looks = {(to_hex(line.get_color()), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == 9


def test_confusion_has_shares_of_rows_and_counts():
    counts = np.array([[3, 1, 0], [0, 2, 2], [0, 0, 0]])
    figure = confusion_figure(counts, ["box", "mug", "cup"], title="run")
    axes = figure.axes[0]
    assert axes.images[0].get_array().tolist() == [[75, 25, 0], [0, 50, 50], [0, 0, 0]]
    written = {(text.get_position()[1], text.get_position()[0]): int(text.get_text()) for text in axes.texts}
    assert written == {(row, column): counts[row, column] for row, column in zip(*counts.nonzero())}
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["box", "mug", "cup"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("predicted", "true", "run")


@pytest.mark.parametrize(
    ("losses", "expected"), quick(1, [([3.2, 2.4, 2.1], 3), ([3.0, 0.4, 0.04], 4), ([2e3, 1.0, 2e-3], 5)])
)
def test_logarithmic_axes_have_plain_numbers_where_they_belong(losses, expected):
    figure = training_curves({"a": [{"epoch": n, "train_loss": loss} for n, loss in enumerate(losses, 1)]})
    axis = panel(figure, "Training loss").yaxis
    figure.draw_without_rendering()
    low, high = axis.get_view_interval()
    labels = {tick: label.get_text() for tick, label in zip(axis.get_majorticklocs(), axis.get_majorticklabels())}
    shown = {tick: text for tick, text in labels.items() if low <= tick <= high}
    assert len(shown) >= expected and not axis.get_minorticklocs().size
    assert all(float(text) == pytest.approx(tick, rel=1e-5) for tick, text in shown.items())


def test_classes_are_in_the_order_of_the_first_run():
    first = {"box": 0.9, "mug": None, "cup": 0.1, "vase": 0.5}
    second = {"box": 0.2, "mug": 0.3, "cup": 0.4, "vase": 0.6}
    axes = class_accuracy_figure({"first": first, "second": second}).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["mug", "cup", "vase", "box"]
    for line, values in zip(axes.lines, (first, second)):
        x, y = line.get_data()
        assert np.rint(y).tolist() == [0, 1, 2, 3], "on the line of its class"
        expected = [math.nan if values[name] is None else 100 * values[name] for name in names]
        assert x == pytest.approx(expected, nan_ok=True)


def test_divergence_leaves_dense_runs_out_and_keeps_the_colours():
    logs = {"dense": DENSE, "sparse": SPARSE}
    apart, rate = divergence_figure(logs).axes
    assert curve(apart, "sparse") == [[1, 0.1], [2, 0.01]] and apart.get_yscale() == "log"
    assert curve(rate, "sparse") == [[1, 0.1], [2, 0.2]] and len(apart.lines) == len(rate.lines) == 1
    (again,) = [line for line in training_curves(logs).axes[0].lines if line.get_label() == "sparse"]
    assert apart.lines[0].get_color() == again.get_color()
    identical = [{"epoch": 1, "divergence": 0.0, "share_rate": 0.75}]
    assert divergence_figure({"equal": identical}).axes[0].get_yscale() == "linear"


def test_corruptions_start_clean_and_end_with_their_mean():
    def result(clean, jitter, scale):
        return {"clean": {"oa": clean}, "corruptions": {"jitter": {"oa": jitter}, "scale": {"oa": scale}}}

    falling, flat = [0.8, 0.7, 0.6, 0.5, 0.4], [0.6] * 5
    figure = corruption_figure({"a": result(0.9, falling, flat), "b": result(0.5, flat, flat)})
    assert [axes.get_title() for axes in figure.axes] == ["jitter", "scale", "mean of all"]
    jitter, _, mean = figure.axes
    assert curve(jitter, "a") == [
        [severity, pytest.approx(value)] for severity, value in enumerate([90, 80, 70, 60, 50, 40])
    ]
    assert curve(mean, "a") == [
        [severity, pytest.approx(value)] for severity, value in enumerate([90, 70, 65, 60, 55, 50])
    ]
    assert curve(mean, "b") == [[severity, pytest.approx(value)] for severity, value in enumerate([50] + [60] * 5)]


def test_bars_are_as_long_as_the_numbers():
    figure = throughput_figure({"dense": 200.0, "S2D": 150.0}, errors={"S2D": 10.0}, unit="clouds a second")
    axes = figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == [200, 150]
    assert [text.get_text() for text in axes.texts] == ["200", "150"] and axes.get_xlabel() == "clouds a second"
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first on top"
    segments = axes.collections[0].get_segments()
    assert [np.ptp(segment[:, 0]) for segment in segments] == [0, 20]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: training_curves({}), "no run with a column 'epoch'"),
        (lambda: training_curves({"a": []}), "no run with a column 'epoch'"),
        (lambda: confusion_figure([[1, 2]], ["a", "b"]), r"shape \(1, 2\) for 2 classes"),
        (lambda: confusion_figure([[1, -2], [0, 0]], ["a", "b"]), "negative count"),
        (lambda: class_accuracy_figure({}), "no class to plot"),
        (lambda: divergence_figure({"dense": DENSE}), "no run with experts with a column 'divergence'"),
        (lambda: corruption_figure({}), "no accuracies under corruptions"),
        (lambda: throughput_figure({}), "no throughput"),
        (lambda: throughput_figure({"a": math.nan}), "throughput of a is nan"),
        (lambda: throughput_figure({"a": -1.0}), "throughput of a is -1.0"),
        (lambda: save_figure(throughput_figure({"a": 1.0}), "bars.jpg"), "bars.jpg: a plot is a PNG, SVG or PDF"),
    ],
)
def test_what_cannot_be_plotted_is_one_line(draw, message):
    with pytest.raises(InputError, match=message) as error:
        draw()
    assert "\n" not in str(error.value)


def test_files_have_the_format_of_their_suffix(tmp_path):
    figure = throughput_figure({"dense": 100.0})
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        assert save_figure(figure, tmp_path / f"bars{suffix}").read_bytes().startswith(start)
    image = imread(tmp_path / "bars.png")
    assert image.shape[1] == 825, "7.5 inches of 110 pixels"
    blue = (np.abs(image[..., :3] - np.array([0, 0x72, 0xB2]) / 255) < 0.02).all(-1)
    assert blue.sum() > 5000, "the bar"
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".pdf", ".png", ".svg"]


def test_svg_is_text_that_names_nothing_outside():
    text = figure_svg(throughput_figure({"a run & <its> name": 1.0}))
    tree = ElementTree.fromstring(text)
    words = "".join(tree.itertext())
    assert "a run & <its> name" in words and "clouds a second" in words, "text, not outlines"
    for element in tree.iter():
        for name, value in element.attrib.items():
            if name.endswith("href"):
                assert value.startswith("#")
            assert "url(" not in value or "url(#" in value
    assert figure_svg(throughput_figure({"a run & <its> name": 1.0})) == text, "no date, no random names"


def test_matplotlibs_settings_are_left_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure_svg(throughput_figure({"dense": 100.0}))
    assert dict(matplotlib.rcParams) == before and matplotlib.rcParams["svg.fonttype"] == "path"
