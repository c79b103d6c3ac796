"""Experts under FSDP2: two ranks with sharded experts end where one process with whole ones does."""

import os
import subprocess
import sys

import torch
from timm.layers import Mlp

from s2d3d import RUPMoF
from s2d3d.s2d.sharding import expert_placement

TRAINING = """
import sys
import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from s2d3d import EWA, MoFConfig, apply_ewa_, convert_to_mof_, merge_experts
from s2d3d.s2d.sharding import expert_placement


def build():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    convert_to_mof_(model, MoFConfig(num_experts=3, every=1, init_noise=0.1))
    return model


def train(model):
    torch.manual_seed(1)  # equal data and equal partitions on both ranks: their mean gradient is that of one process
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ewa = EWA(model, share_rate=0.3, schedule="constant", total_steps=4)
    for _ in range(4):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.randn(6, 3, 8, 8)), torch.randint(3, (6,))).backward()
        optimizer.step()
        ewa.step()


dist.init_process_group("gloo")
whole, sharded = build(), build()
place = expert_placement(sharded)
for block in sharded.blocks:
    fully_shard(block, shard_placement_fn=place)
fully_shard(sharded, shard_placement_fn=place)
stacked = sharded.blocks[0].mlp.fc1.weight
assert stacked.placements == (Shard(1),) and stacked.to_local().shape == (3, 8, 64), (stacked.placements, stacked.shape)
assert sharded.blocks[0].attn.qkv.weight.placements == (Shard(0),)
train(whole)
train(sharded)
gathered = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
if dist.get_rank() == 0:
    rebuilt = build()
    start = merge_experts(rebuilt).state_dict()
    rebuilt.load_state_dict(gathered)
    merged, expected = merge_experts(rebuilt).state_dict(), merge_experts(whole).state_dict()
    for key in expected:
        torch.testing.assert_close(merged[key], expected[key], rtol=1e-4, atol=1e-6)
    moved = (expected["blocks.1.mlp.fc1.weight"] - start["blocks.1.mlp.fc1.weight"]).abs().max()
    assert moved > 1e-3, moved
    spread = whole.blocks[1].mlp.fc1.weight.std(0).mean()
    torch.testing.assert_close(rebuilt.blocks[1].mlp.fc1.weight.std(0).mean(), spread, rtol=1e-4, atol=1e-7)

by_expert = build()
fully_shard(by_expert)  # without the placement: the experts lie on different ranks
try:
    apply_ewa_(by_expert, 0.3)
except ValueError as error:
    assert "shard_placement_fn=expert_placement(model)" in str(error), error
else:
    raise AssertionError("averaged what is not there")
if dist.get_rank() == 0:
    print("same")
dist.destroy_process_group()
"""


def test_two_ranks_with_sharded_experts_train_average_and_merge_as_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAINING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "same" in done.stdout, done.stderr[-3000:]


def test_only_stacked_parameters_are_placed():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), RUPMoF(Mlp(8, 32), num_experts=4))
    place = expert_placement(model)
    assert [place(parameter) for parameter in model[0].parameters()] == [None, None]
    assert [place(parameter).dim for parameter in model[1].parameters()] == [1, 1, 1, 1]
