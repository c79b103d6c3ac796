"""Reading a run folder: the files that `RunFolder` and the trainer wrote, with checks of their content."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..atomic import read_json, real_path
from ..config.load import load_config
from ..datasets.corruptions import CORRUPTIONS
from ..errors import InputError
from ..stored import check_stored
from .folder import FORMS, RunFolder, require_run
from .log import read_log
from .schemas import Analysis, Environment, Metrics, PretrainingMetrics, Robustness, WholeReport

_ADVICE = "write it again or remove it"
_ANALYSE_AGAIN = "write it again with tools/analyze.py, or remove it"


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder.

    Attributes:
        name: name of the run in tables and figures.
        config: resolved, as plain types.
        log: the rows of log.csv, as `read_log` returns them.
        environment: the content of environment.json; empty without that file.
        metrics: the content of metrics.json; empty while the run is not finished.
        analysis: the content of analysis.json, which `tools/analyze.py` writes, or None.
        robustness: the content of robustness.json, which `tools/evaluate.py --corruption all` writes, or None.
        folder: where the files are; None for a record that was made from numbers.
        checkpoint: the final model, or None.
    """

    name: str
    config: Mapping[str, Any]
    log: Sequence[Mapping[str, float]]
    environment: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    analysis: Mapping[str, Any] | None = None
    robustness: Mapping[str, Any] | None = None
    folder: RunFolder | None = None
    checkpoint: Path | None = None

    @property
    def final(self) -> Mapping[str, Any] | None:
        """The accuracies of the model in merged.pt or final.pt; None while the run is not finished."""
        return self.metrics[final_form(self.metrics)] if self.metrics else None


def final_form(reports: Mapping[str, Any]) -> str:
    """Return the form of the model that a run saved as merged.pt or final.pt.

    That is the value of `kept`. Older files have no `kept`; for them it is the form with re-estimated BatchNorm
    statistics if there is one, else the routed or the merged model.

    Args:
        reports: by form: the content of metrics.json, the results of a study record, or the trainer's `reports`.

    Raises:
        InputError: `reports` has none of the forms.

    Example:
        >>> final_form({"merged": {"oa": 0.2}, "recalibrated": {"oa": 0.5}})
        'recalibrated'
        >>> final_form({"merged": {"oa": 0.2}, "ema": {"oa": 0.5}})
        'merged'
    """
    kept = reports.get("kept")
    candidates = ("recalibrated", "routed", "merged") if kept is None else (kept,)
    form = next((form for form in candidates if form in FORMS and form in reports), None)
    if form is None:
        raise InputError(f"no accuracy of a finished model among {', '.join(reports) or 'nothing'}")
    return form


def read_runs(paths: Sequence[str | Path]) -> list[RunRecord]:
    """Read run folders, finished or not. A run is named by its folder, or by the whole path if a folder name repeats.

    Raises:
        InputError: a path is not a run folder, has no finished epoch, is named twice, or has a damaged file.

    Example:
        >>> read_runs(["runs/demo"])[0].final["oa"]  # doctest: +SKIP
        0.9083
    """
    folders = [Path(path) for path in paths]
    resolved = [real_path(folder) for folder in folders]
    for index, place in enumerate(resolved):
        if place in resolved[:index]:
            raise InputError(f"{folders[index]}: is named twice; name each run once")
    short = [place.name for place in resolved]
    names = [name if short.count(name) == 1 else str(folder) for name, folder in zip(short, folders)]
    return [_read(RunFolder(folder), name) for folder, name in zip(folders, names)]


def _read(folder: RunFolder, name: str) -> RunRecord:
    require_run(folder.root)
    log = read_log(folder.log) if folder.log.is_file() else []
    if not log:
        advice = "was it removed?" if folder.merged.is_file() else "wait for the end of the first one"
        raise InputError(f"{folder.log}: holds no epoch; {advice}")
    ends = [path for path in (folder.final, folder.merged) if path.is_file()]
    return RunRecord(
        name=name,
        config=load_config(folder.config).to_dict(),
        log=log,
        environment=read_environment(folder.environment),
        metrics=read_metrics(folder.metrics),
        analysis=read_json(folder.analysis, schema=Analysis, advice=_ANALYSE_AGAIN)
        if folder.analysis.exists()
        else None,
        robustness=read_robustness(folder.robustness) if folder.robustness.is_file() else None,
        folder=folder,
        checkpoint=ends[0] if ends else None,
    )


def read_environment(path: Path, *, advice: str = _ADVICE) -> dict[str, Any]:
    """Return the environment of a run; empty if there is no such file.

    Raises:
        InputError: it is damaged; the message ends with `advice`.
    """
    return read_json(path, schema=Environment, advice=advice) if path.exists() else {}


def read_metrics(path: Path, *, advice: str = _ADVICE) -> dict[str, Any]:
    """Return the results of a run, of a classifier or a pre-training; empty if it has not ended.

    Raises:
        InputError: they are damaged; where a value is missing or wrong, the message ends with `advice`.
    """
    metrics = read_json(path, advice=advice) if path.exists() else {}
    if metrics:
        schema = PretrainingMetrics if metrics.get("task") == "pretrain" else Metrics
        check_stored(metrics, schema, where=path, advice=advice)
        try:
            final_form(metrics)
        except InputError as error:
            raise InputError(f"{path}: {error}; it is not what tools/train.py writes") from None
    return metrics


def require_whole(records: Sequence[RunRecord]) -> None:
    """Refuse runs whose metrics.json lacks what tables and figures show.

    Raises:
        InputError: as said.
    """
    for record in records:
        for form in FORMS if record.metrics.get("task") != "pretrain" else ():
            if record.folder is not None and form in record.metrics:
                where = f"{record.folder.metrics}: {form}"
                check_stored(
                    record.metrics[form], WholeReport, where=where, advice="it is not what tools/train.py writes"
                )


def find_reference(checkpoint: str | Path) -> Path | None:
    """Return the robustness file of a checkpoint's dense baseline, or None if it does not exist.

    The name of the run folder is changed from "s2d" to "dense": for runs/modelnet_s2d_small/merged.pt the file is
    runs/modelnet_dense_small/robustness.json.
    """
    folder = Path(checkpoint).parent
    folder = folder.parent if folder.name == "checkpoints" else folder
    if "s2d" not in folder.name:  # a file here, such as model.onnx, has a folder without a name
        return None
    path = RunFolder(folder.with_name(folder.name.replace("s2d", "dense"))).robustness
    return path if path.is_file() else None


def read_robustness(path: str | Path) -> dict[str, Any]:
    """Read a file that `tools/evaluate.py --corruption all --output FILE.json` wrote.

    Raises:
        InputError: the file is missing, or has other content.
    """
    content = read_json(path, advice=f"make it with tools/evaluate.py --corruption all --output {path}")
    advice = "it needs a file that --corruption all wrote"
    check_stored(content, Robustness, where=path, advice=advice)
    for name in CORRUPTIONS:
        if name not in content["corruptions"]:
            raise InputError(f"{path}: corruptions.{name} is missing; {advice}")
    return content
