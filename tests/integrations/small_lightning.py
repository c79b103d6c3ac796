"""What the tests of Lightning train: apart from them, so that only those who need Lightning load it."""

import warnings

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.layers import Mlp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from s2d3d import MoFConfig, convert_to_mof_
from s2d3d.integrations.lightning import S2DCallback
from tests.integrations.recorder import UPDATES, Recorder

__all__ = [
    "UPDATES", "Classifier", "Manual", "ModelCheckpoint", "Recorder", "S2DCallback", "Stop", "batches", "fit", "sparse",
    "trainer_of", "weights",
]  # fmt: skip


class Classifier(LightningModule):
    """Maps (B, T, 6) to 3 classes through an FFN, in automatic optimization."""

    def __init__(self):
        super().__init__()
        self.mlp, self.drop, self.head = Mlp(6, 12), nn.Dropout(0.2), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.drop(x + self.mlp(x)).mean(1))

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Manual(Classifier):
    """Two optimizers, stepped by hand; that of the experts after every second batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        head, mlp = self.optimizers()
        self.manual_backward(super().training_step(batch, index))
        head.step()
        head.zero_grad()
        if index % 2 == 1:
            mlp.step()
            mlp.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.head.parameters(), lr=0.1), torch.optim.SGD(self.mlp.parameters(), lr=0.1)]


class Stop(Callback):
    """Ends a training after its first epoch."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


def sparse(kind=Classifier) -> LightningModule:
    torch.manual_seed(1)
    module = kind()
    convert_to_mof_(module, MoFConfig(targets=("mlp",), every=1, init_noise=0.5))
    return module


def batches(factor: float = 1.0) -> DataLoader:
    """Return 10 samples in batches of 2, shuffled by the global generator; `factor` multiplies the first sample."""
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(10, 4, 6, generator=generator), torch.arange(10) % 3
    x[0] *= factor
    return DataLoader(TensorDataset(x, y), batch_size=2, shuffle=factor == 1.0)


def trainer_of(folder, *callbacks, **settings) -> Trainer:
    settings = {"max_epochs": 2, "accumulate_grad_batches": 2, **settings}
    return Trainer(
        default_root_dir=folder, callbacks=list(callbacks), accelerator="cpu", devices=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, **settings,
    )  # fmt: skip


def fit(folder, *callbacks, module=None, data=None, resume=None, validate=False, **settings) -> LightningModule:
    module = module or sparse()
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few workers and batches
        trainer = trainer_of(folder, *callbacks, **settings)
        trainer.fit(module, data or batches(), batches() if validate else None, ckpt_path=resume)
    return module


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
