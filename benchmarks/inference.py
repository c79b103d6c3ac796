"""Evaluation: this package compared with the reference modules, and merged compared with dense."""

from functools import partial

from .interleave import Contestant, interleave
from .presets import PUBLIC_BERT, PUBLIC_TRANSFORMER, SMALL_BERT, Preset, spec_for
from .section import Section, Settings, new_section
from .training import ModelSpec, build_inference, inference_flops
from .versus import (
    DENSE,
    EXPERTS,
    FOLDED,
    MERGED,
    REFERENCE_A,
    REFERENCE_B,
    add_rates,
    add_versus,
    contestants,
    measure_package,
)

AGAIN = "ours, dense again"


def measure(settings: Settings) -> Section:
    """Measure batches of evaluation.

    Raises:
        InputError: contestants of equal mathematics disagree, or a process dies.
    """
    section = new_section("inference", "Evaluation", settings)
    add_rates(section, settings)
    for name, preset in (("point_bert", PUBLIC_BERT), ("point_transformer", PUBLIC_TRANSFORMER)):
        _against_reference(section, settings, name, preset)
    _small(section, settings, spec_for(SMALL_BERT, settings))
    return section


def _against_reference(section: Section, settings: Settings, name: str, preset: Preset) -> None:
    spec = spec_for(preset, settings)
    present = contestants(build_inference, spec, settings)
    present.append(Contestant(FOLDED, partial(build_inference, spec.but(folded=True)), note="fold_batchnorm"))
    if name == "point_bert":
        present += _merged_and_again(spec)
    comparison = interleave(
        f"{name} evaluation",
        present,
        title=f"{name}: one batch of evaluation, batch {spec.batch}, {spec.points} points",
        start=settings.apart(),
        base=REFERENCE_A,
        samples=spec.batch,
        pairs=[(FOLDED, REFERENCE_A), (FOLDED, REFERENCE_B), *([(MERGED, DENSE)] if name == "point_bert" else [])],
        **settings.interleaving(10, min_seconds=0.5),
    )
    section.comparisons.append(comparison)
    add_versus(section, settings, name, comparison, inference_flops(spec))
    measure_package(section, settings, name, "evaluation", build_inference, spec)
    for condition, reference in (("A", REFERENCE_A), ("B", REFERENCE_B)):
        section.add_speedup(f"{name}.folded_{condition}", comparison, FOLDED, reference)
    if name == "point_bert":
        section.add_ratio(f"{name}.merged", comparison, MERGED, DENSE)
        section.add_ratio(f"{name}.noise", comparison, AGAIN, DENSE)


def _merged_and_again(spec: ModelSpec) -> list[Contestant]:
    merged = partial(build_inference, spec.but(experts=EXPERTS, merged=True))
    return [
        Contestant(MERGED, merged, note=f"converted to {EXPERTS} experts and merged"),
        Contestant(AGAIN, partial(build_inference, spec), note="the same once more: its ratio is noise"),
    ]


def _small(section: Section, settings: Settings, spec: ModelSpec) -> None:
    comparison = interleave(
        "point_bert_small evaluation",
        [Contestant(DENSE, partial(build_inference, spec)), *_merged_and_again(spec)],
        title=f"point_bert_small: one batch of evaluation, batch {spec.batch}, {spec.points} points",
        start=settings.apart(),
        samples=spec.batch,
        **settings.interleaving(20, min_seconds=0.2),
    )
    section.comparisons.append(comparison)
    section.add_ratio("point_bert_small.merged", comparison, MERGED, DENSE)
    section.add_ratio("point_bert_small.noise", comparison, AGAIN, DENSE)
    section.add_rate("point_bert_small.samples_per_second", comparison, DENSE)
