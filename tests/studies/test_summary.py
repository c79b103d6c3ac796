"""From records to numbers and pages, without runs."""

import statistics

import numpy as np
import pytest

from s2d3d.errors import InputError
from s2d3d.studies.page import report_lines, report_text
from s2d3d.studies.plan import load_study
from s2d3d.studies.stats import (
    bonferroni_level,
    correctness,
    detectable_difference,
    equivalence_p,
    hierarchical_bootstrap,
    holm,
    paired_t,
)
from s2d3d.studies.summary import summarize


def made_up(study, seed=0):
    """A record for every run of a study: marks drawn at random, arms of a seed scored on the same shapes."""
    rng = np.random.default_rng(seed)
    environment = {
        "python": "3",
        "packages": {"torch": "2"},
        "processor": "a CPU",
        "num_threads": 1,
        "git_commit": "c0",
    }
    records = {}
    for cell in study.cells:
        marks = {form: "".join(rng.choice(["0", "1"], 50, p=[0.3, 0.7])) for form in ("merged", "ema")}
        results = {
            form: {"oa": text.count("1") / 50, "macc": text.count("1") / 60, "loss": rng.random(), "correct": text}
            for form, text in marks.items()
        }
        records[cell.arm, cell.seed] = {
            "shapes": f"those of seed {cell.seed}", "updates": 12, "train_seconds": 10.0 * len(cell.arm) + cell.seed,
            "parameters": {"training": 1000 * cell.config.s2d.num_experts, "merged": 1000}, "results": results,
            "environment": environment, "curve": {"train_loss": [2.0, rng.random()]},
        }  # fmt: skip
    return records


@pytest.fixture
def three_arms(write_study):
    arms = {"dense": {"s2d.kind": "none"}, "s2d": {"train.ema_decay": 0.5}, "k2": {"s2d.num_experts": 2}}
    return load_study(write_study(arms=arms, seeds=[0, 1, 2], forms={"s2d_ema": "s2d.ema"}))


def test_the_summary_is_what_the_records_say(three_arms):
    records = made_up(three_arms)
    summary = summarize(three_arms, records)
    rows = {row["name"]: row for row in summary["rows"]}
    assert list(rows) == ["dense", "s2d", "k2", "s2d_ema"] and rows["s2d_ema"]["form"] == "ema"
    for name, arm, form in (("dense", "dense", "merged"), ("k2", "k2", "merged"), ("s2d_ema", "s2d", "ema")):
        oa = [records[arm, seed]["results"][form]["oa"] for seed in (0, 1, 2)]
        assert rows[name]["oa_mean"] == pytest.approx(statistics.fmean(oa))
        assert rows[name]["oa_std"] == pytest.approx(statistics.stdev(oa))
        assert list(rows[name]["oa"].values()) == oa
        assert rows[name]["train_seconds_mean"] == 10 * len(arm) + 1
    assert rows["s2d"]["parameters"] == {"training": 4000, "merged": 1000}
    assert summary["num_comparisons"] == len(summary["comparisons"]) == 3 and summary["empty"] == []
    for item, p in zip(summary["comparisons"], holm([item["p"] for item in summary["comparisons"]])):
        arm, form = three_arms.config.row(item["name"])
        sides = ((arm, form or "merged"), ("dense", "merged"))
        marks = [
            [correctness(records[side, seed]["results"][form]["correct"]) for side, form in sides] for seed in (0, 1, 2)
        ]
        differences = [ours.mean() - theirs.mean() for ours, theirs in marks]
        test = paired_t(differences)
        assert item["n"] == 3 and item["p_holm"] == p
        assert (item["mean"], item["p"]) == pytest.approx((test.mean, test.p))
        assert (item["t_low"], item["t_high"]) == pytest.approx((test.low, test.high))
        wide = paired_t(differences, bonferroni_level(3))
        assert (item["bonferroni_low"], item["bonferroni_high"]) == pytest.approx((wide.low, wide.high))
        bounds = hierarchical_bootstrap([ours - theirs for ours, theirs in marks], crossed=False)
        assert (item["bootstrap_low"], item["bootstrap_high"]) == bounds
        assert item["equal_updates"] is True
        assert item["detectable"] == pytest.approx(detectable_difference(test.std, 3))
        losses = [[records[side, seed]["results"][form]["loss"] for side, form in sides] for seed in (0, 1, 2)]
        last = [[records[side, seed]["curve"]["train_loss"][1] for side, _ in sides] for seed in (0, 1, 2)]
        for key, pairs in (("scored", losses), ("training", last)):
            test = paired_t([ours - theirs for ours, theirs in pairs])
            assert item["losses"][key] == {"mean": test.mean, "t_low": test.low, "t_high": test.high}


def test_shapes_of_a_test_split_are_drawn_once_for_all_seeds(write_study):
    study = load_study(write_study(evaluate="test", common={"data.val_fraction": 0}))
    records = {key: {**record, "shapes": "all"} for key, record in made_up(study).items()}
    summary = summarize(study, records)
    parts = []
    for seed in (0, 1):
        ours, theirs = (records[arm, seed]["results"]["merged"]["correct"] for arm in ("s2d", "dense"))
        parts.append(correctness(ours) - correctness(theirs))
    (item,) = summary["comparisons"]
    assert (item["bootstrap_low"], item["bootstrap_high"]) == hierarchical_bootstrap(parts, crossed=True)
    assert "Shapes are drawn once for all seeds of a resample" in report_text(summary, "command")


def test_the_page_states_every_number_and_what_was_corrected(three_arms):
    summary = summarize(three_arms, made_up(three_arms))
    text = report_text(summary, "python tools/study.py configs/studies/tiny.yaml")
    table, losses = (
        {line.split(" | ")[0].removeprefix("| "): line for line in part.splitlines() if line.startswith("| ")}
        for part in text.split("## Paired differences in loss")
    )
    for row in summary["rows"]:
        line = next(value for key, value in table.items() if key.split(" ")[0] == row["name"] and " - " not in key)
        assert f"{100 * row['oa_mean']:.2f} +- {100 * row['oa_std']:.2f}" in line
        assert all(f"| {100 * value:.2f} |" in line for value in row["oa"].values())
        assert f"{row['parameters']['training']:,} / 1,000" in line
    for item in summary["comparisons"]:
        line = table[f"{item['name']} - {item['reference']}"]
        assert f"| {100 * item['mean']:+.2f} | [{100 * item['t_low']:+.2f}, {100 * item['t_high']:+.2f}] |" in line
        assert f"[{100 * item['bonferroni_low']:+.2f}, {100 * item['bonferroni_high']:+.2f}]" in line
        assert f"| {100 * item['detectable']:.2f} |" in line
        line = losses[f"{item['name']} - {item['reference']}"]
        for loss in item["losses"].values():
            assert f"| {loss['mean']:+.4f} [{loss['t_low']:+.4f}, {loss['t_high']:+.4f}] |" in line
    assert "3 comparison(s)" in text and "Holm" in text and "10,000 resamples" in text
    assert "None: every configuration has all its seeds." in text
    assert "(50 shapes), the test split was not used" in text and "last epoch" in text
    assert any(line.startswith("s2d - dense") and "(n = 3)" in line for line in report_lines(summary))


def test_empty_cells_are_listed_and_still_count_in_the_correction(three_arms):
    records = made_up(three_arms)
    for seed in (0, 2):
        del records["k2", seed]
    summary = summarize(three_arms, records)
    assert summary["empty"] == [["k2", 0], ["k2", 2]]
    by_name = {item["name"]: item for item in summary["comparisons"]}
    assert by_name["k2"]["n"] == 1 and by_name["k2"]["p"] is None and by_name["k2"]["mean"] is not None
    smallest = min(by_name["s2d"]["p"], by_name["s2d_ema"]["p"])
    assert min(by_name["s2d"]["p_holm"], by_name["s2d_ema"]["p_holm"]) == pytest.approx(min(1, 3 * smallest))
    assert by_name["k2"]["losses"]["scored"]["t_low"] is None and by_name["k2"]["detectable"] is None
    text = report_text(summary, "command")
    assert "\n- k2: seed 0, 2\n" in text and "| empty |" in text


def test_arms_that_were_not_scored_on_the_same_shapes_are_not_compared(three_arms):
    records = made_up(three_arms)
    records["k2", 1]["shapes"] = "others"
    with pytest.raises(InputError, match="'k2' and 'dense' were not scored on the same shapes with seed 1"):
        summarize(three_arms, records)


def test_a_form_that_runs_do_not_have_is_named(three_arms):
    records = made_up(three_arms)
    del records["s2d", 2]["results"]["ema"]
    with pytest.raises(InputError, match=r"forms\.s2d_ema: runs of 's2d' have no form 'ema', they have merged"):
        summarize(three_arms, records)


def test_another_number_of_updates_is_said(three_arms):
    records = made_up(three_arms)
    records["k2", 1]["updates"] = 13
    summary = summarize(three_arms, records)
    assert [item["equal_updates"] for item in summary["comparisons"]] == [True, False, True]
    assert "k2 - dense (other number of updates)" in report_text(summary, "command")


def test_pairs_made_by_different_code_are_marked_and_left_out_once_more(three_arms):
    records = made_up(three_arms)
    changed = records["s2d", 1]["environment"] | {"git_commit": "c0+"}
    records["s2d", 1]["environment"] = changed
    summary = summarize(three_arms, records)
    by_name = {item["name"]: item for item in summary["comparisons"]}
    assert "mixed_code" not in by_name["k2"], "its runs are of one commit"
    item = by_name["s2d"]
    rest = paired_t([item["differences"][seed] for seed in ("0", "2")])
    assert item["mixed_code"]["seeds"] == [1] and item["mixed_code"]["n_without"] == 2
    without = item["mixed_code"]["without"]
    assert (without["mean"], without["t_low"], without["t_high"]) == pytest.approx((rest.mean, rest.low, rest.high))
    assert item["n"] == 3, "the headline keeps all pairs"
    text = report_text(summary, "command")
    each = ", ".join(f"{100 * value:+.2f}{'*' * (seed == '1')}" for seed, value in item["differences"].items())
    assert f"| {each} |" in text
    interval = f"[{100 * rest.low:+.2f}, {100 * rest.high:+.2f}]"
    assert f"| s2d - dense | 1 | 2 | {100 * rest.mean:+.2f} | {interval} |" in text
    assert "Code states may differ" in text and "Code states may differ" not in report_text(
        summarize(three_arms, made_up(three_arms)), "command"
    )


@pytest.mark.parametrize(
    "commits, mixed",
    [
        ((["c0"], ["c0"]), False),
        ((["c0+"], ["c0+"]), True),
        (([None], [None]), True),
        ((["c1", "c0"], ["c0"]), True),
        ((["c0", "c0"], ["c0"]), False),
    ],
)
def test_each_start_of_both_runs_must_be_of_one_clean_commit(three_arms, commits, mixed):
    records = made_up(three_arms)
    for arm, (*earlier, last) in zip(("dense", "k2"), commits):
        starts = [{"git_commit": commit} for commit in earlier]
        records[arm, 0]["environment"] = records[arm, 0]["environment"] | {"git_commit": last, "earlier": starts}
    summary = summarize(three_arms, records)
    assert ("mixed_code" in summary["comparisons"][1]) == mixed
    assert {str(commit) for side in commits for commit in side} <= {*summary["commits"]}


def test_a_comparison_whose_pairs_are_all_of_different_code_is_empty_without_them(three_arms):
    records = made_up(three_arms)
    for seed in (0, 1, 2):
        records["k2", seed]["environment"] = records["k2", seed]["environment"] | {"git_commit": "c1"}
    summary = summarize(three_arms, records)
    assert summary["comparisons"][1]["mixed_code"] == {"seeds": [0, 1, 2], "n_without": 0, "without": None}
    assert "| k2 - dense | 0, 1, 2 | 0 | empty | - |" in report_text(summary, "command")


def test_selection_on_the_test_split_is_shown_beside_the_result(write_study):
    study = load_study(write_study(evaluate="test", common={"data.val_fraction": 0}, curve="test"))
    records = {key: {**record, "shapes": "all"} for key, record in made_up(study).items()}
    curves = {("dense", 0): [0.1, 0.4, 0.3], ("dense", 1): [0.2, 0.3, 0.5], ("s2d", 0): [0.6, 0.2, 0.4],
              ("s2d", 1): [0.1, 0.3, 0.2]}  # fmt: skip
    for key, curve in curves.items():
        records[key]["curve"]["test_oa"] = curve
    summary = summarize(study, records)
    (item,) = summary["comparisons"]
    expected = {  # of s2d and of dense, seeds 0 and 1
        "last epoch": ((0.4 + 0.2) / 2, (0.3 + 0.5) / 2),
        "best test epoch of each run": ((0.6 + 0.3) / 2, (0.4 + 0.5) / 2),
        "best test epoch of the best of 2 runs": (0.6, 0.5),
    }
    assert [choice["rule"] for choice in item["selection"]] == list(expected)
    text = report_text(summary, "command")
    assert "## Selection on the test split" in text and "They are not results." in text and ", after each epoch" in text
    for choice in item["selection"]:
        ours, theirs = expected[choice["rule"]]
        assert (choice["oa"], choice["reference_oa"]) == pytest.approx((ours, theirs))
        assert choice["mean"] == pytest.approx(ours - theirs)
        assert f"| {choice['rule']} | {100 * ours:.2f} | {100 * theirs:.2f} | {100 * (ours - theirs):+.2f} |" in text
    test = paired_t([0.4 - 0.3, 0.2 - 0.5])
    assert (item["selection"][0]["t_low"], item["selection"][0]["t_high"]) == pytest.approx((test.low, test.high))
    assert item["selection"][2]["t_low"] is None, "one difference has no interval"


def test_equivalence_is_tested_where_the_study_asks(write_study, three_arms):
    asked = load_study(write_study(seeds=[0, 1, 2], equivalence=20))
    summary = summarize(asked, made_up(asked))
    (item,) = summary["comparisons"]
    p = equivalence_p(list(item["differences"].values()), 0.2)
    assert item["equivalence"] == {"margin": 0.2, "p": p} and p is not None
    text = report_text(summary, "command")
    assert "| p, equivalent within 20 points |" in text and f"| {p:.2g} |" in text
    assert "equivalent" not in report_text(summarize(three_arms, made_up(three_arms)), "command")


def test_a_pre_training_compares_reconstruction_losses_and_no_run_with_its_own_training(repository):
    study = load_study(repository / "configs/studies/pretraining.yaml")
    records = made_up(study)
    for record in records.values():
        record["results"]["initial"] = record["results"].pop("ema")
    text = report_text(summarize(study, records), "command")
    random, s2d = (
        next(line for line in text.split("## Paired differences in loss")[1].splitlines() if line.startswith(start))
        for start in ("| dense - random ", "| s2d - dense ")
    )
    assert random.endswith("] | - |") and s2d.endswith("] |")
    assert "Reconstruction loss, mean" in text and "Nats" not in text and "smoothing" not in text
