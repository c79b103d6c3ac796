"""The training step that CUDA graphs record: it equals the trainer's, never waits for the host, and is checked."""

import contextlib

import pytest
import torch
from cases import quick
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import gpu, graphs, training
from benchmarks.graphs import RecordedStep, build_recorded, check_recorded, drawing_from, record
from benchmarks.presets import PUBLIC_BERT, SPARSE_TRANSFORMER
from benchmarks.training import TrainingStep, without_dropping
from s2d3d import RUPMoF, Trainer
from s2d3d.errors import InputError
from s2d3d.s2d.dispatch import random_partition

TINY = PUBLIC_BERT.quick.but(experts=2)
BEFORE_BATCH_NORM = [f"encoder.{name}.bias" for name in ("first_conv.0", "first_conv.3", "second_conv.0")]
"""Biases that a BatchNorm takes away again: their gradient is rounding alone, and nothing at all on some processors."""


class Unrecorded:
    """What stands in for a recorded step without a GPU: the same updates from the same generator, one by one."""

    def __init__(self, step, generator):
        self.step, self.generator = step, generator

    def launch(self, learning_rate=training.LEARNING_RATE):
        with drawing_from(self.generator):
            self.step.run(learning_rate)

    def join(self):
        pass


# Against the trainer


@pytest.mark.parametrize("recordable", quick(1, [True, False]))
def test_updates_equal_those_of_the_trainer(recordable, tiny_config, monkeypatch):
    """Warm-up, cosine and the rise of the share rate included, from the same weights, batches and random state."""
    config = tiny_config(
        "train.epochs=2", "train.max_steps=9", "train.label_smoothing=0", "model.drop_path_rate=0.2",
        "optim.clip_grad=0.5",
    )  # fmt: skip
    trainer, seen = Trainer(config), []
    compute = trainer._forward_backward

    def watch(points, labels):
        if not seen:
            watch.state = {key: value.clone() for key, value in trainer.model.state_dict().items()}
            watch.random = torch.get_rng_state()
            for group in trainer.optimizer.param_groups:
                group["eps"] = graphs.CHECK_EPS  # else BEFORE_BATCH_NORM would move by what rounding leaves
        seen.append((points.clone(), labels.clone(), trainer.optimizer.param_groups[0]["lr"]))
        return compute(points, labels)

    monkeypatch.setattr(trainer, "_forward_backward", watch)
    trainer.fit()
    assert len(seen) == 9 and len({rate for *_, rate in seen}) > 5 and trainer.ewa.last_share_rate() > 0

    monkeypatch.setattr(training, "SHARE_RATE", config.s2d.share_rate)
    monkeypatch.setattr(training, "CLIP", config.optim.clip_grad)
    monkeypatch.setattr(training, "NUM_CLASSES", len(trainer.data.class_names))
    spec = TINY.but(name=config.model.name, kwargs=config.model.kwargs, experts=config.s2d.num_experts, batch=16)
    step = TrainingStep(
        spec.but(points=128), recordable=recordable, schedule="linear", total_steps=trainer.total_updates
    )
    step.model.load_state_dict(watch.state)
    for group in step.optimizer.param_groups:
        group["eps"] = graphs.CHECK_EPS
    torch.set_rng_state(watch.random)
    for points, labels, learning_rate in seen:
        step.points.copy_(points)
        step.labels.copy_(labels)
        step.run(learning_rate)
    assert step.ewa.state_dict() == trainer.ewa.state_dict()
    for key, value in trainer.model.state_dict().items():
        same = step.model.state_dict()[key]
        torch.testing.assert_close(same, value, rtol=0, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
        trained = not torch.equal(value, watch.state[key])
        assert trained or key in BEFORE_BATCH_NORM, f"{key} was not trained"


# Nothing waits for the host


@pytest.fixture
def fake_step(monkeypatch):
    """A step whose tensors have no values: whoever reads one, by `item`, `tolist`, `bool` or `nonzero`, fails."""

    def read(*_, **__):
        raise AssertionError("a tensor went to the host")

    @contextlib.contextmanager
    def make(spec, recordable):
        model = training.build_model(spec)
        with monkeypatch.context() as patch, FakeTensorMode():
            patch.setattr(Tensor, "cpu", read)  # which has nothing to do on a CPU, and would pass
            patch.setattr(Tensor, "numpy", read)
            patch.setattr(
                training, "build_model", lambda spec: model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
            )
            patch.setattr(
                training, "clouds",
                lambda batch, count, *_: (torch.empty(batch, count, 3), torch.zeros(batch, dtype=torch.int64)),
            )  # fmt: skip
            yield TrainingStep(spec, recordable=recordable)

    return make


@pytest.mark.parametrize(
    "spec",
    quick(1, [TINY, TINY.but(experts=3, precision="bf16"), SPARSE_TRANSFORMER.quick.but(experts=2)]),
    ids=["point_bert", "bf16", "point_transformer"],
)
@pytest.mark.parametrize("recordable", quick(1, [True, False]))
def test_no_part_of_the_step_reads_a_value(spec, recordable, fake_step):
    """Forward, loss, backward, clipping, AdamW and EWA; the second update has gradients and moments of the first."""
    with fake_step(spec, recordable) as step:
        for _ in range(2):
            step.prepare()
            loss = step.compute()
        assert loss.shape == ()
        assert all(parameter.grad.shape == parameter.shape for parameter in step.parameters)
        assert len(step.optimizer.state) == len(step.parameters)


@pytest.mark.parametrize(
    "read",
    quick(1, [
        lambda x: x.item(), lambda x: bool(x > 1), lambda x: x.tolist(), lambda x: x.nonzero(), lambda x: x.cpu(),
        lambda x: x.numpy(), float,
    ]),
)  # fmt: skip
@pytest.mark.parametrize("place", ["clipping", "averaging"])
def test_a_part_that_reads_a_value_is_noticed(place, read, fake_step, monkeypatch):
    def clip(parameters, *_, **__):
        read(parameters[0].grad.sum())

    with fake_step(TINY, True) as step:
        if place == "clipping":
            monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", clip)
        else:
            monkeypatch.setattr(step.ewa, "average_", lambda rate: read(rate))
        step.prepare()
        with pytest.raises((RuntimeError, AssertionError)):
            step.compute()


# The comparison before anything is timed


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(graphs, "RecordedStep", Unrecorded)


@pytest.mark.parametrize("spec", quick(1, [TINY.but(experts=0), TINY]), ids=["dense", "S2D"])
def test_steps_that_are_recorded_right_pass(spec, without_gpu):
    check_recorded(spec, count=2)
    task = build_recorded(spec, count=2)
    task.run()
    assert [tuple(logits.shape) for logits in task.outputs()] == [(2, training.NUM_CLASSES)] * 2


@pytest.mark.parametrize(
    "fault", quick(2, ["share rate", "partition", "learning rate", "moments", "averaging", "clouds"])
)
def test_steps_that_are_recorded_wrong_are_refused(fault, without_gpu, monkeypatch):
    """Each fault is one that a graph would have: a number that was baked in, or a part that was left out."""

    class Wrong(Unrecorded):
        def __init__(self, step, generator):
            super().__init__(step, generator)
            if fault == "share rate":
                monkeypatch.setattr(step.ewa, "current_share_rate", lambda: 0.0)
            elif fault == "averaging":
                monkeypatch.setattr(step.ewa, "average_", lambda rate: None)
            elif fault == "moments":  # the warm-up's are still there
                before = [parameter.detach().clone() for parameter in step.parameters]
                with drawing_from(torch.Generator().manual_seed(5)):
                    step.run()
                for parameter, value in zip(step.parameters, before):
                    parameter.data.copy_(value)
                step.ewa.num_steps = 0

        def launch(self, learning_rate=0.0):
            if fault == "partition":
                self.generator.manual_seed(0)
            elif fault == "clouds":
                self.step.points.mul_(0.9)
            super().launch(training.LEARNING_RATE if fault == "learning rate" else learning_rate)

    monkeypatch.setattr(graphs, "RecordedStep", Wrong)
    message = r"after 4 recorded updates of 1 seed\(s\), weights of seed 3 differ from those of plain updates by"
    with pytest.raises(InputError, match=message):
        check_recorded(TINY.but(seed=3, points=48, batch=6))


def test_borrowed_random_numbers_are_the_generators_and_nobody_elses():
    mine, same = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    before = torch.get_rng_state()
    drawn = []
    for _ in range(2):
        with drawing_from(mine):
            drawn.append(torch.rand(5))
    assert torch.equal(torch.stack(drawn).flatten(), torch.cat([torch.rand(5, generator=same) for _ in range(2)]))
    assert torch.equal(torch.get_rng_state(), before)


# On a GPU

GPU = TINY.but(device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "spec",
    [GPU, GPU.but(experts=0), GPU.but(precision="bf16"), GPU.but(compile=True), SPARSE_TRANSFORMER.quick.but(
        experts=2, device="cuda"
    )],
    ids=["S2D", "dense", "bf16", "compiled", "point_transformer"],
)  # fmt: skip
@pytest.mark.parametrize("count", [1, 3])
def test_recorded_updates_side_by_side_equal_plain_ones(spec, count):
    check_recorded(spec, count)


@pytest.mark.gpu
def test_each_replay_draws_another_partition_the_one_of_an_eager_call():
    generator = torch.Generator("cuda").manual_seed(3)
    with drawing_from(generator):
        random_partition(257, 4, "cuda")  # loads kernels
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            source = random_partition(256, 4, "cuda").source
    generator.manual_seed(3)
    replayed = []
    for _ in range(5):
        graph.replay()
        replayed.append(source.clone())
    generator.manual_seed(3)
    with drawing_from(generator):
        eager = [random_partition(256, 4, "cuda").source for _ in range(5)]
    for index, order in enumerate(replayed):
        assert torch.equal(order.sort().values, torch.arange(256, device="cuda"))
        assert torch.equal(order, eager[index])
        assert all(not torch.equal(order, other) for other in replayed[:index])


@pytest.mark.gpu
def test_the_partition_inside_a_recorded_step_changes_from_replay_to_replay():
    """Seen in the loss: with a learning rate of 0 and experts that differ, nothing else changes it."""
    step = TrainingStep(GPU, recordable=True)
    for layer in (module for module in step.model.modules() if isinstance(module, RUPMoF)):
        for parameter in layer.expert_parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    step.ewa.share_rate = 0.0
    with without_dropping(step.model):
        recorded = record(step, seed=1)
        losses = []
        for _ in range(6):
            recorded.launch(0.0)
            recorded.join()
            losses.append(recorded.loss.item())
    assert len(set(losses)) > 3, losses


@pytest.mark.gpu
def test_recording_leaves_no_trace_and_seeds_differ():
    plain = TrainingStep(GPU)
    steps = [TrainingStep(GPU.but(seed=seed), recordable=True) for seed in (0, 1)]
    default = torch.cuda.get_rng_state()
    recorded = [record(step, seed) for seed, step in enumerate(steps)]
    assert torch.equal(torch.cuda.get_rng_state(), default)
    for key, value in plain.model.state_dict().items():
        assert torch.equal(steps[0].model.state_dict()[key], value), key
    assert all(not value.any() for values in steps[0].optimizer.state.values() for value in values.values())
    assert steps[0].ewa.num_steps == 0
    for one in recorded:
        assert isinstance(one, RecordedStep)
        losses = []
        for _ in range(30):
            one.launch()
            one.join()
            losses.append(one.loss.item())
        assert losses[-1] < 0.7 * losses[0]
    first, second = (step.parameters[0] for step in steps)
    assert not torch.equal(first, second)


@pytest.mark.gpu
def test_the_share_rate_of_a_recorded_update_is_that_of_the_schedule():
    """Experts that are 1 apart: what EWA leaves of it is known in closed form, a rate baked in would leave another."""
    step = TrainingStep(GPU, recordable=True, schedule="linear", total_steps=4)
    weight = next(m for m in step.model.modules() if isinstance(m, RUPMoF)).fc1.weight
    recorded, expected = record(step, seed=0), 1.0
    with torch.no_grad():
        weight[1].copy_(weight[0] + 1)
    for update in range(4):
        recorded.launch(0.0)
        recorded.join()
        expected *= 1 - 2 * training.SHARE_RATE * update / 3
        torch.testing.assert_close(weight[1] - weight[0], torch.full_like(weight[0], expected), rtol=0, atol=1e-5)


@pytest.mark.gpu
def test_all_contestants_of_a_gpu_take_part():
    """In processes of their own, as in the tool: in one, graphs of torch.compile and ours got in each other's way."""
    from benchmarks.section import Settings, new_section

    settings = Settings(torch.device("cuda"), 1, rounds=1, quick=True)
    section = new_section("gpu", "Training on a GPU", settings)
    gpu.measure_throughput(section, settings, PUBLIC_BERT.quick.but(device="cuda"))
    assert all(not comparison.skipped for comparison in section.comparisons)
    assert section.measures["cuda.gpu.seeds_4.samples_per_second"].value > 0
