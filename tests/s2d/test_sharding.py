"""Experts under FSDP2: two ranks with sharded experts end where one process with whole ones does."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from children import START
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.multiprocessing import start_processes

from s2d3d import EWA, MoFConfig, RUPMoF, apply_ewa_, convert_to_mof_, merge_experts
from s2d3d.s2d.sharding import expert_placement


def build() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    convert_to_mof_(model, MoFConfig(num_experts=3, every=1, init_noise=0.1))
    return model


def train(model: torch.nn.Module) -> None:
    torch.manual_seed(1)  # equal data and equal partitions on both ranks: their mean gradient is that of one process
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ewa = EWA(model, share_rate=0.3, schedule="constant", total_steps=4)
    for _ in range(4):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(torch.randn(6, 3, 8, 8)), torch.randint(3, (6,))).backward()
        optimizer.step()
        ewa.step()


def compare_ranks(rank: int, folder: str) -> None:
    """Train a sharded and a whole model on one of two ranks; the first one leaves a file if they end alike."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    whole, sharded = build(), build()
    place = expert_placement(sharded)
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh, shard_placement_fn=place)
    fully_shard(sharded, mesh=mesh, shard_placement_fn=place)
    stacked = sharded.blocks[0].mlp.fc1.weight
    assert stacked.placements == (Shard(1),) and stacked.to_local().shape == (3, 8, 64)
    assert sharded.blocks[0].attn.qkv.weight.placements == (Shard(0),)
    train(whole)
    train(sharded)
    gathered = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
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
    fully_shard(by_expert, mesh=mesh)  # without the placement: the experts lie on different ranks
    with pytest.raises(ValueError, match=r"shard_placement_fn=expert_placement\(model\)"):
        apply_ewa_(by_expert, 0.3)
    if rank == 0:
        (Path(folder) / "same").touch()
    dist.destroy_process_group()


def test_two_ranks_with_sharded_experts_train_average_and_merge_as_one(tmp_path):
    start_processes(compare_ranks, (str(tmp_path),), nprocs=2, start_method=START)
    assert (tmp_path / "same").exists()


def test_only_stacked_parameters_are_placed():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), RUPMoF(Mlp(8, 32), num_experts=4))
    place = expert_placement(model)
    assert [place(parameter) for parameter in model[0].parameters()] == [None, None]
    assert [place(parameter).dim for parameter in model[1].parameters()] == [1, 1, 1, 1]
