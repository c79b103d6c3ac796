"""What the tests of the Hugging Face Trainer train: apart from them, so that only those who need it load it."""

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from s2d3d import MoFConfig, convert_to_mof_
from s2d3d.integrations.transformers import S2DCallback, save_merged
from tests.integrations.recorder import UPDATES, Recorder

__all__ = [
    "UPDATES", "Recorder", "S2DCallback", "Stop", "Trainer", "ViTForImageClassification", "dense", "images",
    "save_merged", "sparse", "topk", "trainer_of", "weights",
]  # fmt: skip

CONFIG = ViTConfig(
    hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
    hidden_dropout_prob=0.1,
)  # fmt: skip


def images(bad: int | None = None) -> list[dict]:
    """Return 10 images, one of them infinite if asked for."""
    generator = torch.Generator().manual_seed(5)
    made = [{"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": n % 2} for n in range(10)]
    if bad is not None:
        made[bad]["pixel_values"] = torch.full((3, 8, 8), float("inf"))
    return made


def sparse() -> ViTForImageClassification:
    torch.manual_seed(1)
    model = ViTForImageClassification(CONFIG)
    convert_to_mof_(model, MoFConfig(targets=("*.mlp",), init_noise=0.5))
    return model


class Stop(TrainerCallback):
    """Ends a training after some updates."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def trainer_of(folder, model=None, *, callbacks=(), data=None, **arguments) -> Trainer:
    settings = dict(
        output_dir=str(folder), num_train_epochs=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=0.01, save_strategy="steps", save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
        logging_strategy="no", seed=7,
    )  # fmt: skip
    arguments = TrainingArguments(**{**settings, **arguments})
    return Trainer(model or sparse(), arguments, train_dataset=data or images(), callbacks=list(callbacks))


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def dense() -> ViTForImageClassification:
    return ViTForImageClassification(CONFIG)


def topk() -> ViTForImageClassification:
    model = dense()
    convert_to_mof_(model, MoFConfig(targets=("*.mlp",), kind="topk"))
    return model
