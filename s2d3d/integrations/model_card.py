"""The model card of a trained classifier: what it takes, how it was trained, how well it did, and its limits."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..errors import printable
from ..markdown import markdown_table
from ..optional import optional
from ..runs.record import RunRecord
from ..version import __version__

DATA_LICENCES = {
    "shapes": "that of this repository",
    "modelnet40": "academic research only; do not redistribute",
    "scanobjectnn": "on request from its authors, see below",
}
"""Licence by the name of a data set, in the words of data/README.md."""
UNKNOWN_LICENCE = "not known to s2d3d; add it here before you share the model"
TAGS = ["point-cloud", "point-cloud-classification", "sparse-to-dense"]


def model_card(description: Mapping[str, Any], record: RunRecord | None) -> str:
    """Return a model card in the format of the Hugging Face hub: YAML between two lines of dashes, then Markdown.

    Args:
        description: of the model, as in a checkpoint, without its weights.
        record: the run that ended with this model; None if there is none, which the card says.
    """
    title = f"{description['model']['name']} trained on {_data_name(description)}"
    text = "\n\n".join(
        [
            f"# {title}",
            f"This model assigns a 3D point cloud to one of {len(description['class_names'])} classes. "
            + _training_kind(description),
            _use(),
            _input(description),
            _results(description, record),
            _recipe(description, record),
            _licence(description),
            _limits(description, record),
        ]
    )
    return f"---\n{_metadata(description, record, title)}\n---\n\n{text}\n"


def _data_of(description: Mapping[str, Any]) -> Mapping[str, Any]:
    data = description["config"].get("data")
    return data if isinstance(data, dict) else {}


def _data_name(description: Mapping[str, Any]) -> str:
    """Return the name of the data set; of class folders that of the folder."""
    data = _data_of(description)
    name = str(data.get("name", "unknown data"))
    return _plain(Path(str(data.get("root", name))).name if name == "files" else name)


def _metadata(description: Mapping[str, Any], record: RunRecord | None, title: str) -> str:
    name, results = _data_name(description), None
    if record is not None and record.final is not None:
        final = record.final
        results = [
            EvalResult(
                task_type="point-cloud-classification", dataset_type=name, dataset_name=name,
                dataset_split=record.metrics.get("split", "test"), metric_type="accuracy", metric_name=title,
                metric_value=final[key],
            )
            for title, key in (("OA", "oa"), ("mAcc", "macc"))
            if key in final
        ]  # fmt: skip
    own = _data_of(description).get("name") == "shapes"
    licence: dict[str, Any] = {"license": "mit"} if own else {"license": "other", "license_name": "see-the-data"}
    card = ModelCardData(
        library_name="s2d3d", tags=TAGS, model_name=title if results else None, eval_results=results, **licence
    )
    return card.to_yaml()


def _training_kind(description: Mapping[str, Any]) -> str:
    s2d = description["config"].get("s2d", {})
    if s2d.get("kind", "none") != "rup":
        return "It was trained without experts."
    experts = f"{s2d.get('num_experts')} experts in place of some feed-forward networks"
    return f"It was trained Sparse-to-Dense with {experts}. They are merged: it has the size of the dense model."


def _use() -> str:
    return """## Use

```python
from s2d3d import PointCloudClassifier
from s2d3d.datasets.files import read_cloud

classifier = PointCloudClassifier.from_pretrained("FOLDER")  # or the id on the hub
options = dict(normalize=classifier.normalize, channels=classifier.channels)
cloud = read_cloud("chair.ply", classifier.num_points, **options)
print(classifier.class_names[int(classifier(cloud[None]).argmax())])
```

    s2d3d predict --checkpoint FOLDER chair.ply"""


def _input(description: Mapping[str, Any]) -> str:
    data, model = _data_of(description), description["model"]
    rows = {
        "points of a cloud": data.get("num_points"),
        "channels": f"{model['in_channels']} ({model.get('channels', 'xyz')})",
        "up axis": model.get("up_axis", "z"),
        "normalisation": "centred, in the unit sphere" if data.get("normalize", True) else "none",
        "classes": ", ".join(map(_plain, description["class_names"])),
    }
    return f"## Input\n\n{_pairs(rows)}"


def _results(description: Mapping[str, Any], record: RunRecord | None) -> str:
    if record is None or record.final is None:
        return "## Results\n\nThe accuracy of this model is not known: no record of its run was beside the checkpoint."
    final, metrics = record.final, record.metrics
    total = final.get("num_samples")
    interval = "not known"
    if total:
        with optional("scipy", "the interval of an accuracy", extra="hub"):
            from scipy.stats import binomtest
        wilson = binomtest(round(final["oa"] * total), total).proportion_ci(method="wilson")
        interval = f"[{100 * wilson.low:.1f}, {100 * wilson.high:.1f}]"
    macc = f"{100 * final['macc']:.2f}" if "macc" in final else "not known"
    head = ("data set", "split", "clouds", "OA, %", "95 % interval", "mAcc, %", "seed", "model of")
    row = (
        _data_name(description), metrics.get("split", "test"), total or "not known",
        f"{100 * final['oa']:.2f}", interval, macc, metrics.get("seed", "not known"),
        metrics.get("selection", "last epoch"),
    )  # fmt: skip
    text = (
        "The interval (Wilson) covers the choice of the evaluated clouds. It does not cover the seed of the training: "
        "this is one run. OA is overall accuracy, mAcc the mean of the classes' accuracies."
    )
    return f"## Results\n\n{markdown_table(head, [list(map(str, row))])}\n\n{text}"


def _recipe(description: Mapping[str, Any], record: RunRecord | None) -> str:
    config = description["config"]
    rows: dict[str, Any] = {
        section: ", ".join(f"{key} {_plain(value)}" for key, value in config[section].items())
        for section in ("model", "s2d", "optim", "train")
        if isinstance(config.get(section), dict)
    }
    rows["augmentation"] = ", ".join(
        f"{key} {value}" for key, value in _data_of(description).get("augment", {}).items()
    )
    if record is not None:
        environment, metrics = record.environment, record.metrics
        packages = environment.get("packages", {})
        rows |= {
            "updates": metrics.get("updates", "not known"),
            "seconds of training": f"{metrics['train_seconds']:.0f}" if "train_seconds" in metrics else "not known",
            "processor": _plain(environment.get("processor", "not known")),
            "gpus": ", ".join(map(_plain, environment.get("gpus", []))) or "none",
            "versions": f"s2d3d {environment.get('s2d3d', 'not known')}, torch {packages.get('torch', 'not known')}",
        }
    text = f"The complete configuration is in `config.json`. This card was written by s2d3d {__version__}."
    return f"## Training\n\n{_pairs(rows)}\n\n{text}"


def _licence(description: Mapping[str, Any]) -> str:
    name = str(_data_of(description).get("name"))
    licence = DATA_LICENCES.get(name, UNKNOWN_LICENCE).removesuffix(", see below")
    return f"## Licence\n\nTraining data `{_plain(name)}`: {licence}. The code of s2d3d has the MIT licence."


def _limits(description: Mapping[str, Any], record: RunRecord | None) -> str:
    limits = [
        "It classifies whole clouds of one object. It does no segmentation and no detection.",
        f"It knows {len(description['class_names'])} classes and gives one of them to every cloud, also to a cloud of "
        "something else. Its probabilities are not calibrated.",
        "Clouds from another sensor, of parts of objects or with another vertical axis were not tested.",
    ]
    if record is not None and record.final is not None:
        per_class = {name: share for name, share in record.final.get("per_class", {}).items() if share is not None}
        if per_class:
            worst = min(per_class, key=lambda name: per_class[name])
            limits.append(
                f"Its weakest class among the evaluated clouds is {_plain(worst)}, with {100 * per_class[worst]:.1f} %."
            )
        if record.robustness is None:
            limits.append("Its accuracy on corrupted clouds was not measured.")
        else:
            limits.append(f"On corrupted clouds its mean OA is {100 * record.robustness['mean_oa']:.1f} %.")
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _plain(value: object) -> str:
    """Return a value as text in which nothing begins markup."""
    return printable(str(value)).replace("<", "&lt;").replace("`", "'")


def _pairs(rows: Mapping[str, object]) -> str:
    return markdown_table(["", ""], [[key, str(value)] for key, value in rows.items()])
