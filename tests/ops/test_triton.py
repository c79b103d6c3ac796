"""The Triton kernels against their plain forms: by Triton's interpreter where there is no GPU, and on a GPU."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from s2d3d import RUPMoF, apply_ewa_
from s2d3d.ops.points import farthest_point_sample

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

IN_THE_INTERPRETER = """
import torch
from s2d3d.ops import triton as ops_triton
from s2d3d.ops.points import ORIGIN_RADIUS_SQ, farthest_point_sample
from s2d3d.s2d.ewa_triton import average_experts_

torch.manual_seed(0)
for count, number, skip in ((100, 9, False), (16, 16, True), (1, 1, True), (130, 12, True)):
    points = torch.rand(3, count, 3) - 0.5
    if skip:
        points[:, : count // 3] *= 0.05  # many within the radius about the origin
        points[2] *= 0.01  # no other point may be selected
    expected = farthest_point_sample(points, number, skip_origin=skip)
    radius = ORIGIN_RADIUS_SQ if skip else -1.0
    selected = ops_triton.farthest_point_sample(points.transpose(1, 2).contiguous(), number, radius)
    assert torch.equal(selected, expected), (count, number, skip)
for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2**-6)):
    for weight in (0.1, 0.7, 1.0):
        stacked = torch.randn(4, 37, 50).to(dtype)
        exact = stacked.float()
        expected = exact.lerp(exact.mean(0, keepdim=True), weight)
        from_memory = stacked.clone()
        average_experts_(stacked, weight)
        assert (stacked.float() - expected).abs().max() <= bound, (dtype, weight)
        assert weight < 1 or all(torch.equal(stacked[0], expert) for expert in stacked)
        average_experts_(from_memory, torch.tensor(weight, dtype=torch.float64))
        assert torch.equal(from_memory, stacked), (dtype, weight)
print("all equal")
"""


@needs_triton
def test_kernels_in_the_interpreter_equal_the_plain_forms():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_INTERPRETER], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "all equal\n", done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("skip_origin", [False, True])
def test_sampling_on_a_gpu_equals_the_plain_form(skip_origin):
    points = torch.rand(8, 1024, 3) - 0.5
    expected = farthest_point_sample(points, 64, skip_origin=skip_origin)
    assert torch.equal(farthest_point_sample(points.cuda(), 64, skip_origin=skip_origin).cpu(), expected)


@pytest.mark.gpu
def test_averaging_on_a_gpu_equals_the_plain_form():
    from timm.layers import Mlp

    layer = RUPMoF(Mlp(64, 256), num_experts=4)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    layer_on_gpu = RUPMoF(Mlp(64, 256), num_experts=4).cuda()
    layer_on_gpu.load_state_dict(layer.state_dict())
    apply_ewa_(layer, 0.3)
    apply_ewa_(layer_on_gpu, 0.3)
    for name, parameter in layer_on_gpu.state_dict().items():
        torch.testing.assert_close(parameter.cpu(), layer.state_dict()[name])
