"""Public packages as contestants: what they compute is what ours compute, and who is missing is named in one line."""

import importlib
import re
import sys

import pytest
import torch

from benchmarks import ops, packages, pointcloud
from benchmarks.interleave import Skip, deviation
from benchmarks.presets import PUBLIC_BERT, PUBLIC_TRANSFORMER
from benchmarks.section import Settings, new_section
from benchmarks.training import build_inference, build_step
from s2d3d import create_model
from s2d3d.models.vector_attention import VectorAttention, find_neighbours

CPU = torch.device("cpu")


@pytest.fixture
def installed(monkeypatch):
    """Load a package, or skip where it is missing; what `pointcloud` puts in its modules is taken out again."""

    def load(module):
        found = pytest.importorskip(module, exc_type=ImportError)
        for name in ("group", "fps", "knn", "knn_graph"):
            if hasattr(found, name):
                monkeypatch.setattr(found, name, getattr(found, name))
        return found

    return load


@pytest.mark.parametrize("preset", [PUBLIC_BERT, PUBLIC_TRANSFORMER], ids=["point_bert", "point_transformer"])
def test_models_of_torch_pointcloud_compute_what_ours_compute(preset, installed):
    """In evaluation and in training without dropping; with other weights the check would notice."""
    package = installed(f"torch_pointcloud.models.{preset.quick.name}")
    ours, theirs, other = (
        build_step(preset.quick.but(**changes))
        for changes in ({}, {"source": "torch-pointcloud"}, {"source": "torch-pointcloud", "seed": 1})
    )
    assert type(theirs.run.__self__.model.model).__module__ == package.__name__
    expected = ours.outputs()
    assert deviation(theirs.outputs(), expected) <= 1e-4 < 0.1 < deviation(other.outputs(), expected)
    losses = [float(theirs.run()) for _ in range(24)]
    assert losses[-1] < 0.9 * losses[0]
    evaluated = build_inference(preset.quick.but(source="torch-pointcloud")).outputs()
    assert deviation(evaluated, build_inference(preset.quick).outputs()) <= 1e-4


def test_the_attention_of_torch_pointcloud_is_ours(installed):
    installed("torch_pointcloud.models.point_transformer")
    ours = VectorAttention(16, 4)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter)
    theirs = pointcloud.point_transformer_conv(ours, 16, 4)
    xyz, x = torch.rand(2, 24, 3), torch.randn(48, 16)
    found = find_neighbours(xyz, xyz, 5)
    edges = torch.stack([found.rows, torch.arange(48).repeat_interleave(5)])
    torch.testing.assert_close(theirs(x, xyz.flatten(0, 1), edges), ours(x, found), rtol=1e-4, atol=1e-4)


def test_models_that_torch_pointcloud_does_not_have(installed):
    installed("torch_pointcloud.models.point_transformer")
    for name in ("point_mae", "point_transformer"):  # the latter with FFNs
        with pytest.raises(Skip, match=f"torch-pointcloud has no {name} of this kind"):
            pointcloud.pointcloud_model(name, 5, {}, create_model(f"{name}", num_classes=5))


def test_a_weight_without_a_place_is_noticed():
    ours, theirs = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    pointcloud.load_weights_(theirs, {"weight": ours.weight.detach()}, ())
    assert torch.equal(theirs.weight, ours.weight) and not theirs.bias.any()
    with pytest.raises(AssertionError, match=r"no place for \['scale'\]"):
        pointcloud.load_weights_(theirs, {**ours.state_dict(), "scale": torch.ones(1)}, ())


@pytest.mark.parametrize("package", ["torch_cluster", "fpsample", "pyg_lib"])
def test_operators_select_the_points_that_ours_select(package, installed, monkeypatch):
    """`interleave` refuses a contestant that selects others: here it takes part, so it was compared."""
    installed(package)
    name = {"pyg_lib": "torch-pointcloud", "fpsample": "fpsample (bucket)"}.get(package, package)
    settings = Settings(CPU, 1, rounds=1, quick=True)
    section = new_section("ops", "Point operations", settings)
    ops._sampling(section, settings, 2, 64, 20)
    ops._neighbours(section, settings, 2, 8, 64, 4)
    for comparison in section.comparisons[: 1 if package == "fpsample" else 2]:
        assert name in comparison.times, comparison.skipped
        assert package == "fpsample" or comparison.deviations[name] <= comparison.tolerance


def test_operators_that_select_other_points_are_refused(monkeypatch):
    """The stand-in of torch_cluster starts at the last point; nearest neighbours with one that is not."""

    class Cluster:
        @staticmethod
        def fps(flat, of_cloud, ratio, random_start):
            assert not random_start
            xyz = flat.view(2, 64, 3).flip(1)
            return (63 - ops.farthest_point_sample(xyz, 20) + torch.tensor([[0], [64]])).flatten()

        @staticmethod
        def knn(flat, centers, neighbours, of_flat, of_centers):
            xyz = flat.view(2, 64, 3)
            found = torch.cdist(centers.view(2, 8, 3), xyz).topk(neighbours + 1, largest=False).indices[..., 1:]
            return None, (found + torch.tensor([[[0]], [[64]]])).flatten()

    monkeypatch.setitem(sys.modules, "torch_cluster", Cluster)
    settings = Settings(CPU, 1, rounds=1, quick=True)
    section = new_section("ops", "Point operations", settings)
    for measure, sizes in ((ops._sampling, (2, 64, 20)), (ops._neighbours, (2, 8, 64, 4))):
        with pytest.raises(ValueError, match="results of 'torch_cluster' differ from those of 'ours' by"):
            measure(section, settings, "key", *sizes)


@pytest.mark.parametrize(
    ("module", "package", "line"),
    [
        ("torch_cluster", "torch-cluster", "pip install --no-build-isolation torch-cluster"),
        ("torch_pointcloud.ops.cluster", "torch-pointcloud", "pip install torch-pointcloud"),
        ("pyg_lib", "pyg-lib", "it is on no package index, see the page on installation of torch-geometric"),
        (
            "tutel.moe", "tutel",
            "it is on no package index; pip install --no-build-isolation git+https://github.com/microsoft/tutel "
            "builds it",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_with_the_command_that_installs_it(module, package, line, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Skip, match=re.escape(f"{package} is not usable here; {line}") + "$"):
        packages.require(module, package)


def test_a_package_that_does_not_load_says_why(monkeypatch):
    def broken(name):
        raise OSError("undefined symbol: _ZN3c10\nand more")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(Skip, match=r"not usable here \(undefined symbol: _ZN3c10\); pip install --no-build-isolation"):
        packages.require("torch_cluster", "torch-cluster")
