"""log.csv read back."""

import pytest

from s2d3d.errors import InputError
from s2d3d.runs.folder import RunFolder
from s2d3d.runs.log import LOG_COLUMNS, read_log, training_throughput


def test_rows_come_back_as_numbers_without_their_empty_cells(tmp_path):
    rows = [{"epoch": 1, "lr": 0.001, "train_loss": 2.5}, {"epoch": 2, "lr": 1e-06, "test_oa": 0.25}]
    folder = RunFolder(tmp_path)
    folder.write_log(rows, LOG_COLUMNS)
    assert read_log(folder.log) == rows


def test_a_log_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"log\.csv: no such file"):
        read_log(tmp_path / "log.csv")


def test_training_throughput_is_the_median_of_the_epochs():
    rows = [{"updates": 10, "seconds": 1.0}, {"updates": 20, "seconds": 100.0}, {"updates": 40, "seconds": 4.0}]
    assert training_throughput(rows, 8) == 40, "80, 0.8 and 40 clouds a second: one slow epoch does not count"
    assert training_throughput([{"epoch": 1}], 8) is None
