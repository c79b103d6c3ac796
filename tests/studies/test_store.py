"""The records of a study in one file: whole or named, nothing lost when several publish, older files read as well."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from s2d3d.errors import InputError
from s2d3d.studies.plan import load_study
from s2d3d.studies.run import missing_cells, publish_records
from s2d3d.studies.store import publish, read_records, records_path


def record_of(cell, **changes):
    """A record as a run of a study leaves it, of two shapes."""
    config = cell.config.to_dict()
    del config["output_dir"], config["data"]["root"], config["data"]["cache_dir"]
    record = {
        "study": cell.study, "arm": cell.arm, "seed": cell.seed, "changes": cell.changes, "config": config,
        "data_folder": cell.data_folder, "split": "validation", "shapes": "00", "epochs": 2, "updates": 4,
        "train_seconds": 1.5, "parameters": {"training": 2, "merged": 1}, "kept": "merged",
        "results": {"merged": {"oa": 0.5, "macc": 0.25, "loss": 0.7 / 3, "num_samples": 2, "correct": "01"}},
        "environment": {"git_commit": "c0"}, "curve": {"train_loss": [2.0, 0.1], "val_oa": [None, 0.5]},
    }  # fmt: skip
    return record | changes


def records_of(cells):
    return {(cell.arm, cell.seed): record_of(cell) for cell in cells}


@pytest.fixture
def study(write_study):
    return load_study(write_study(seeds=[2, 10, 1]))


def write_own_file(results, cell, record):
    """Write a record as studies did before they had one file each."""
    path = results / cell.study / cell.arm / f"seed{cell.seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1))
    return path


def test_a_record_is_a_line_sorted_by_arm_and_seed_and_comes_back_equal(study, tmp_path):
    records = records_of(study.cells)
    publish(tmp_path, "tiny", records)
    lines = records_path(tmp_path, "tiny").read_text().splitlines()
    names = [(record["arm"], record["seed"]) for record in map(json.loads, lines)]
    assert names == [("dense", 1), ("dense", 2), ("dense", 10), ("s2d", 1), ("s2d", 2), ("s2d", 10)]
    assert read_records(tmp_path, study.cells) == records
    assert [path.name for path in tmp_path.glob("*.json*")] == ["tiny.jsonl"], "no lock, no half-written file"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"split": "test"}, "the test split scored, the study says validation"),
        ({"curve": {"train_loss": [2.0]}}, "1 epochs, the last with loss 2.0; the study says 2 epochs"),
        ({"curve": {"train_loss": [2.0, None]}}, "2 epochs, the last with loss None; the study says 2 epochs"),
    ],
)
def test_a_record_of_another_split_or_length_is_refused(study, tmp_path, changes, message):
    cell = study.cells[0]
    publish(tmp_path, "tiny", {(cell.arm, cell.seed): record_of(cell, **changes)})
    with pytest.raises(InputError, match=f"line 1: is of a run with {message}; name the study anew"):
        read_records(tmp_path, study.cells)


def test_a_seed_that_is_taken_out_of_a_study_does_not_vanish(write_study, study, tmp_path):
    publish(tmp_path, "tiny", records_of(study.cells))
    fewer = load_study(write_study(seeds=[2, 1]))
    with pytest.raises(InputError) as error:
        read_records(tmp_path, fewer.cells)
    assert [line.partition("tiny.jsonl: ")[2] for line in str(error.value).splitlines()] == [
        f"line {line}: {arm}/seed10 is not in the study; put it back there, or move the record away"
        for line, arm in ((3, "dense"), (6, "s2d"))
    ]


def test_publishing_adds_and_never_replaces(study, tmp_path):
    first, second = study.cells[0], study.cells[1]
    publish(tmp_path, "tiny", records_of([first]))
    path = records_path(tmp_path, "tiny")
    before = path.read_bytes()
    publish(tmp_path, "tiny", {(first.arm, first.seed): record_of(first, updates=99)})
    assert path.read_bytes() == before
    publish(tmp_path, "tiny", records_of([second]))
    assert read_records(tmp_path, study.cells) == records_of([first, second])


def test_nothing_is_lost_when_several_publish_at_once(write_study, tmp_path):
    cells = load_study(write_study(seeds=list(range(20)))).cells
    with ThreadPoolExecutor(8) as pool:  # a lock holds between open files, so threads stand for processes here
        list(pool.map(lambda cell: publish(tmp_path, "tiny", records_of([cell])), cells))
    assert read_records(tmp_path, cells) == records_of(cells)


def test_nothing_to_publish_leaves_nothing(study, tmp_path):
    publish(tmp_path / "results", "tiny", {})
    assert not (tmp_path / "results").exists()


DAMAGES = [
    (lambda text: text[:100], "not JSON ("),
    (lambda text: "[1]", "holds no JSON object"),
    (lambda text: text.replace('"split"', '"spilt"'), "no record of a run, its split is missing or wrong"),
    (lambda text: text.replace('"correct":"', '"correct":"1'), "no record of a run, its results do not add up"),
    (lambda text: text.replace('"loss":', '"los":'), "no record of a run, its results do not add up"),
    (lambda text: text.replace('"kept":"merged"', '"kept":"ema"'), "no record of a run, its kept is missing or wrong"),
    (lambda text: text.replace('"train_loss":', '"loss":'), "no record of a run, its curve is missing or wrong"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_line_is_named_and_the_file_stays_as_it_is(study, tmp_path, damage, message):
    publish(tmp_path, "tiny", records_of(study.cells[:2]))
    path = records_path(tmp_path, "tiny")
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{damage(second)}\n")
    before = path.read_bytes()
    for call in (lambda: missing_cells(study, tmp_path), lambda: publish(tmp_path, "tiny", records_of(study.cells))):
        with pytest.raises(InputError) as caught:
            call()
        assert str(caught.value).startswith(f"{path}: line 2: {message}") and "\n" not in str(caught.value)
        assert str(caught.value).endswith("; remove this line, the study writes it again")
    assert path.read_bytes() == before


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_file_of_one_run_is_named(study, tmp_path, damage, message):
    cell = study.cells[0]
    path = write_own_file(tmp_path, cell, {})
    path.write_text(damage(json.dumps(record_of(cell), separators=(",", ":"))))
    with pytest.raises(InputError) as caught:
        missing_cells(study, tmp_path)
    assert str(caught.value).startswith(f"{path}: {message.replace('not JSON', 'not a JSON file')}")
    assert str(caught.value).endswith("; remove it, the study writes it again") and "\n" not in str(caught.value)


def test_two_records_of_one_run_are_refused(study, tmp_path):
    publish(tmp_path, "tiny", records_of(study.cells[:1]))
    path = records_path(tmp_path, "tiny")
    path.write_text(2 * path.read_text())
    with pytest.raises(InputError, match=r"tiny\.jsonl: line 2: a second record of dense/seed2, after line 1; remove"):
        read_records(tmp_path, study.cells)


def test_older_files_of_one_run_each_are_read_and_join_the_others(study, tmp_path):
    first, second, third, *rest = study.cells
    old = [write_own_file(tmp_path, cell, record_of(cell)) for cell in (first, second)]
    write_own_file(tmp_path, third, record_of(third, updates=99))
    publish(tmp_path, "tiny", records_of([third]))
    expected = records_of([first, second, third])
    assert read_records(tmp_path, study.cells) == expected, "a line wins over a file"
    assert missing_cells(study, tmp_path, write=False) == rest
    assert len(records_path(tmp_path, "tiny").read_text().splitlines()) == 1, "so far nothing was written"
    publish_records(study, tmp_path)
    for path in old:
        path.unlink()
    assert read_records(tmp_path, study.cells) == expected


@pytest.mark.parametrize("own_file", [False, True])
def test_a_run_of_another_study_is_found_in_either_kind_of_file(study, write_study, tmp_path, own_file):
    cell = study.cells[0]
    if own_file:
        write_own_file(tmp_path, cell, record_of(cell))
    else:
        publish(tmp_path, "tiny", records_of([cell]))
    other = load_study(
        write_study(name="other", seeds=[cell.seed], arms={"same": {"s2d.kind": "none"}, "s2d": {}}, reference="same")
    )
    assert [str(cell) for cell in missing_cells(other, tmp_path)] == [f"s2d/seed{cell.seed}"]
    (line,) = records_path(tmp_path, "other").read_text().splitlines()
    names = {"study": "other", "arm": "same", "same_run_as": f"tiny/dense/seed{cell.seed}"}
    assert json.loads(line) == record_of(cell) | names | {"changes": other.cells[0].changes}


def test_a_study_of_test_curves_takes_no_record_without_one(write_study, tmp_path):
    plain = {"evaluate": "test", "common": {"data.val_fraction": 0}, "seeds": [0]}
    cells = load_study(write_study(**plain)).cells
    publish(tmp_path, "tiny", records_of(cells))
    curved = load_study(write_study(**plain, curve="test"))
    with pytest.raises(InputError, match=r"tiny\.jsonl: line 1: is of a run with no accuracy on the test split after"):
        read_records(tmp_path, curved.cells)
    other = load_study(write_study(**plain, curve="test", name="other"))
    assert missing_cells(other, tmp_path, write=False) == other.cells, "none is taken over"
    curve = {"train_loss": [2.0, 0.1], "test_oa": [0.0, 0.5]}
    publish(tmp_path, "third", {(cell.arm, cell.seed): record_of(cell, curve=curve) for cell in cells})
    assert missing_cells(other, tmp_path, write=False) == [], "those with a curve are"
