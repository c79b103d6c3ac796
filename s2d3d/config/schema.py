"""The schema of a run's config: sections, keys, defaults, and constraints between keys.

Keys have the names of the constructor keywords that they set. Modules never take a `Config`: the trainer and the tools
read it and pass plain arguments.
"""

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..channels import XYZ, Channels, num_channels
from .across import build_problems, problems_across
from .clouds import NO_AUGMENTATION, cloud_key_problems
from .io import Problem, raise_problems
from .keywords import keyword_fields, resolve_keywords
from .types import (
    Bool,
    ClassNames,
    DatasetName,
    DeviceName,
    Float,
    Int,
    Interval,
    ModelName,
    NameOrNames,
    Names,
    OptimizerName,
    PathStr,
    Str,
)

if TYPE_CHECKING:
    from ..s2d import MoFConfig

_FROM_DATA = ("num_classes", "in_channels")


class Section(BaseModel):
    """A group of keys: frozen, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NamedSection(Section, extra="allow"):
    """A section that names an object, with the object's keyword arguments in addition to its own keys."""

    @property
    def kwargs(self) -> dict[str, Any]:
        """All keyword arguments of the named object, without the section's own keys."""
        return dict(self.model_extra or {})


class AugmentConfig(Section):
    """Random augmentation of training clouds, drawn for each cloud."""

    scale: Interval | None = Field(
        (0.6666667, 1.5), description="Scale of each axis, uniform in [low, high], 0 < low <= high; null: none."
    )
    shift: Float = Field(
        0.2, ge=0, le=1e6, description="Shift of each axis, uniform in [-shift, shift], cloud units; 0: none."
    )
    rotate: Bool = Field(False, description="Rotate by a random angle about the vertical axis.")
    jitter: Float = Field(
        0.0, ge=0, le=1e6, description="Standard deviation of Gaussian noise on every point, cloud units; 0: none."
    )
    dropout: Float = Field(0.0, ge=0, lt=1, description="Largest fraction of points to drop, in [0, 1); 0: none.")


class DataConfig(NamedSection):
    """The clouds for training and evaluation, and keyword arguments of the data set's reader."""

    name: DatasetName = Field(description="Name of the dataset.")
    root: PathStr = Field(description="Folder that holds the dataset, relative to the working directory.")
    num_points: Int = Field(1024, ge=1, description="Number of points per cloud, at least 1.")
    channels: Channels = Field(
        XYZ,
        description="Numbers of a point: coordinates, with 'normal' a unit normal, with 'rgb' a colour in [0, 1]. The "
        "stored clouds must have them.",
    )
    up_axis: Literal["y", "z"] | None = Field(
        None, description="Vertical axis of the stored clouds; null: the one that the dataset declares."
    )
    normalize: Bool = Field(True, description="Centre every cloud and scale it into the unit sphere.")
    classes: ClassNames | None = Field(None, description="Names of the classes to use, in this order; null: all.")
    fraction: Float = Field(1.0, gt=0, le=1, description="Share of each class's training clouds to use, in (0, 1].")
    val_fraction: Float = Field(
        0.0, ge=0, le=0.5, description="Share of the training clouds held out for validation, in [0, 0.5]; 0: none."
    )
    cache_dir: PathStr | None = Field(
        None,
        description="Folder for derived files; null: next to the dataset, or the user's cache if that is read-only.",
    )
    allow_links: Bool = Field(
        False, description="Follow links that lead out of the dataset's folder, as in trees of git-annex or DVC."
    )
    memory_budget_gb: Float = Field(
        4.0,
        gt=0,
        description="Largest split read into memory, 10^9 bytes; a larger one is read batch by batch, with a cache "
        "of this size.",
    )
    augment: AugmentConfig = Field(AugmentConfig(), description="Random augmentation of training clouds.")

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, data: object) -> object:
        from ..datasets import dataset_reader, datasets_with, list_datasets

        if not isinstance(data, dict):
            return data
        name = data.get("name")
        if name not in list_datasets():
            resolved, problems = resolve_keywords(cls, data, None, Config)
            raise_problems(problems)
            return resolved
        reader = dataset_reader(name)
        idle: list[Problem] = []
        if not reader.clouds:
            defaults = {
                key: cls.model_fields[key].default for key in ("num_points", "channels", "up_axis", "normalize")
            }
            idle = cloud_key_problems(data, defaults, AugmentConfig().model_dump())
            data = data | {"augment": NO_AUGMENTATION}
        parameters = reader.keywords()
        fields = keyword_fields(
            {key: parameter.default for key, parameter in parameters.items()},
            {key: parameter.annotation for key, parameter in parameters.items()},
        )
        others = {key: datasets_with(key) for key in data if key not in fields and key not in cls.model_fields}
        problems = [
            Problem(
                (key,),
                f"only {' and '.join(names)} {'has' if len(names) == 1 else 'have'} one, '{name}' has not; remove it",
            )
            for key, names in others.items()
            if names
        ]
        given = {key: value for key, value in data.items() if not others.get(key)}
        resolved, found = resolve_keywords(cls, given, fields, Config)
        if not found:
            wrong = reader.problems({key: resolved[key] for key in fields})
            problems += [Problem((key,), text) for key, text in wrong.items()]
        raise_problems(idle + problems + found)
        return resolved


class ModelConfig(NamedSection):
    """The backbone: its name, and keyword arguments of its constructor."""

    name: ModelName = Field(description="Name of the model.")
    pretrained: PathStr | None = Field(
        None,
        description="Initial weights: a checkpoint, published or of this package, or a run folder; null: random "
        "weights.",
    )
    pretrained_up_axis: Literal["y", "z"] = Field(
        "z", description="Vertical axis in the training of `pretrained`: 'z' for this package, 'y' for published files."
    )

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, data: object) -> object:
        from ..models import list_models, model_kwargs

        if not isinstance(data, dict):
            return data
        name = data.get("name")
        fields = keyword_fields(model_kwargs(name)) if name in list_models() else None
        given = {key: value for key, value in data.items() if key not in _FROM_DATA}
        problems = [Problem((key,), "comes from the data, remove it") for key in _FROM_DATA if key in data]
        resolved, found = resolve_keywords(cls, given, fields, Config)
        problems += found
        if not problems:
            problems = build_problems(resolved["name"], {key: resolved[key] for key in fields or {}})
        raise_problems(problems)
        return resolved


class S2DConfig(Section):
    """Sparse-to-Dense training: which FFNs become experts and how their weights are averaged."""

    kind: Literal["none", "rup", "topk"] = Field(
        "rup",
        description="'rup': Random Uniform Partition over experts, merged at the end; 'topk': the gated baseline, "
        "not merged; 'none': dense training, other keys unused.",
    )
    num_experts: Int = Field(4, ge=1, le=4096, description="Experts per layer, in [1, 4096]; 1 is the dense FFN.")
    targets: Names | None = Field(
        ("*.mlp",),
        description="Glob patterns over module names: the FFNs that may be replaced; null: the FFN of each transformer "
        "block, found by structure.",
    )
    every: Int = Field(2, ge=1, description="Replace every n-th match in module order, at least 1.")
    init: Literal["copy", "independent"] = Field(
        "copy",
        description="'copy': all experts copy the dense FFN; 'independent': all but the first are random.",
    )
    init_noise: Float = Field(
        0.0, ge=0, description="Noise on the experts' initial weights, relative to each tensor's standard deviation."
    )
    share_rate: Float = Field(
        0.3,
        ge=0,
        le=1,
        description="Share rate of Experts Weights Averaging (the final one if linear), in [0, (K-1)/K] for K experts.",
    )
    schedule: Literal["linear", "constant", "squared_lr"] = Field(
        "linear",
        description="'linear': share rate from 0 to share_rate over the training; 'constant': share_rate; "
        "'squared_lr': share_rate times (learning rate / optim.lr)^2: the experts keep their relative distance.",
    )
    stop_fraction: Float = Field(
        1.0, gt=0, le=1, description="Fraction of the training after which EWA stops, in (0, 1]; below 1: early EWA."
    )
    lr_multiplier: Float = Field(
        1.0,
        gt=0,
        description="Factor on the learning rate of the experts, greater than 0; the schedule stays. With kind "
        "'none': factor for the FFNs that would become experts.",
    )
    top_k: Int = Field(2, ge=1, description="Number of experts per token with kind 'topk', in [1, num_experts].")
    balance_weight: Float = Field(0.01, ge=0, description="Weight of the load-balancing loss with kind 'topk'.")
    capacity_factor: Float | None = Field(
        None, gt=0, description="Slots of an expert in training with kind 'topk', relative to equal load; null: any."
    )

    def mof(self) -> "MoFConfig":
        """Return the settings for `convert_to_mof_`; for kind 'none', those of the sparse counterpart."""
        from ..s2d import MoFConfig

        return MoFConfig(
            self.num_experts,
            self.targets,
            self.every,
            self.init,
            self.init_noise,
            kind="topk" if self.kind == "topk" else "rup",
            top_k=self.top_k,
            capacity_factor=self.capacity_factor,
        )


class OptimConfig(Section):
    """Optimizer and learning-rate schedule."""

    name: OptimizerName = Field("adamw", description="Optimizer, by timm's name.")
    lr: Float = Field(5e-4, gt=0, description="Peak learning rate, greater than 0.")
    weight_decay: Float = Field(0.05, ge=0, description="Weight decay, at least 0; none on biases, norms and tokens.")
    clip_grad: Float | None = Field(10.0, gt=0, description="Largest norm of the gradient; null: no clipping.")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="'cosine': from lr to min_lr; 'constant': lr. Both after the warm-up."
    )
    warmup_epochs: Float = Field(10.0, ge=0, description="Epochs of linear warm-up, below train.epochs; 0: none.")
    warmup_lr: Float = Field(1e-6, ge=0, description="Learning rate at the start of the warm-up, in [0, lr].")
    min_lr: Float = Field(1e-6, ge=0, description="Learning rate at the end of the cosine, in [0, lr].")
    layer_decay: Float = Field(
        1.0,
        gt=0,
        le=1,
        description="Factor on the learning rate from each layer to the one before it, the head has 1; in (0, 1]. "
        "Below 1 for fine-tuning.",
    )


class TrainConfig(Section):
    """The training loop."""

    epochs: Int = Field(300, ge=1, description="Passes over the training clouds, at least 1.")
    batch_size: Int = Field(
        32, ge=1, description="Clouds per optimizer update, in total over all processes and accumulation steps."
    )
    accum_steps: Int = Field(1, ge=1, description="Backward passes per update; must divide batch_size.")
    drop_last: Bool = Field(True, description="Drop the last batch of an epoch if it is incomplete.")
    label_smoothing: Float = Field(0.0, ge=0, lt=1, description="Label smoothing of the loss, in [0, 1).")
    amp: Literal["none", "bf16"] = Field("none", description="Automatic mixed precision; 'none': float32.")
    compile: Bool = Field(False, description="Compile the model with torch.compile.")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = Field(
        "default",
        description="Mode of torch.compile. On a GPU, modes other than 'default' use CUDA graphs and need accum_steps "
        "1; 'max-autotune' also tries kernels for minutes. Not timed on a GPU yet.",
    )
    ema_decay: Float | None = Field(
        None, gt=0, lt=1, description="Decay of a moving average of the weights, in (0, 1); null: none."
    )
    device: DeviceName = Field("auto", description="'auto' (a GPU if there is one), 'cpu', 'cuda' or 'cuda:N'.")
    num_threads: Int | None = Field(None, ge=1, le=1024, description="CPU threads of torch; null: torch decides.")
    save_every: Int = Field(
        1, ge=1, description="Epochs between checkpoints, including best.pt; the last epoch and every stop are saved."
    )
    checkpoint_every: Int | None = Field(
        None, ge=1, description="Updates between checkpoints within an epoch; null: only at the end of epochs."
    )
    keep_every: Int | None = Field(
        None, ge=1, description="Epochs between models kept for analysis (checkpoints/epoch_NNN.pt); null: none."
    )
    freeze: NameOrNames | None = Field(
        None,
        description="Glob patterns over module names: modules that are not trained, with BatchNorm in eval mode; "
        "'backbone': all but the head; null: none.",
    )
    max_steps: Int | None = Field(
        None, ge=1, description="Stop, with a checkpoint, after this many updates in total; schedules span all epochs."
    )


class EvalConfig(Section):
    """Evaluation during and after the training."""

    split: Literal["test", "validation"] = Field(
        "test",
        description="Split of the final evaluation. 'validation': the part that data.val_fraction holds out; "
        "the test split is then never scored.",
    )
    every: Int = Field(
        10, ge=0, description="Epochs between evaluations on the test split while training; 0: only at the end."
    )
    batch_size: Int = Field(64, ge=1, description="Clouds per forward pass, at least 1.")
    votes: Int = Field(1, ge=1, description="Passes whose logits are averaged, at least 1; 1 is the plain pass.")
    recalibrate_batchnorm: Bool = Field(
        True,
        description="Re-estimate BatchNorm statistics on training clouds: of layers behind experts, and of all "
        "layers after fewer than about 110 updates.",
    )

    probe: Bool = Field(
        False,
        description="With task 'pretrain': fit a linear probe at the end, to the features of the model and of the "
        "random encoder of its seed. Needs labels.",
    )


class LogConfig(Section):
    """Progress and logging of a run."""

    interval: Int = Field(20, ge=1, description="Updates between refreshes of the progress display, at least 1.")
    progress: Bool = Field(True, description="Show progress bars on a terminal.")
    tensorboard: Bool = Field(False, description="Write TensorBoard events to tensorboard/ in the run folder.")
    wandb: Str | None = Field(None, description="Weights & Biases project of the run; null: none.")
    report: Bool = Field(
        True,
        description="At the end of `s2d3d train`, write report.html and plots/ into the run folder, if matplotlib is "
        "installed and a tenth of the training's time is enough.",
    )


class Config(Section):
    """The complete config of a run. Get one from `load_config` or `parse_config`."""

    seed: Int = Field(0, ge=0, le=2**32 - 1, description="Seed of all randomness, in [0, 2**32 - 1].")
    output_dir: PathStr = Field(description="Run folder: config, logs, checkpoints and the merged model.")
    task: Literal["classify", "pretrain"] = Field(
        "classify",
        description="'classify': train a classifier; 'pretrain': train a masked autoencoder, which needs no labels.",
    )
    plugins: tuple[PathStr, ...] = Field(
        (), description="Your Python files that register models or data sets; imported before names are looked up."
    )
    data: DataConfig = Field(description="Which clouds.")
    model: ModelConfig = Field(description="Which backbone.")
    s2d: S2DConfig = Field(S2DConfig(), description="Sparse-to-Dense training.")
    optim: OptimConfig = Field(OptimConfig(), description="Optimizer and learning rate.")
    train: TrainConfig = Field(TrainConfig(), description="Training loop.")
    eval: EvalConfig = Field(EvalConfig(), description="Evaluation.")
    log: LogConfig = Field(LogConfig(), description="Progress and logging.")

    @property
    def in_channels(self) -> int:
        """Numbers of a point, which the backbone takes: those of `data.channels`."""
        return num_channels(self.data.channels)

    def to_dict(self) -> dict[str, Any]:
        """Return the complete config, including defaults, as plain types for YAML and JSON."""
        return self.model_dump(mode="json")

    @model_validator(mode="after")
    def _check_across(self) -> "Config":
        raise_problems(problems_across(self))
        return self
