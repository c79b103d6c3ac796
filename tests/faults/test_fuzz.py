"""Input from a stranger ends in one line each, or is right; nothing crashes, hangs, leaks or is left behind."""

import pytest

from faults.fuzz import KINDS
from faults.runner import fuzz

QUICK, THOROUGH = 15, 1000


def test_some_cases_of_every_kind(tmp_path):
    results = fuzz(list(KINDS), 0, QUICK, tmp_path, forked=True)
    assert not [failure for result in results.values() for failure in result.failures]
    for kind, result in results.items():
        assert result.cases == QUICK and result.outcomes["refused"] and result.outcomes["accepted"], (kind, result)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_cases(kind, tmp_path, record):
    result = fuzz([kind], 1000, THOROUGH, tmp_path)[kind]
    record(f"input: {kind}", result.cases, failures=result.failures, **result.outcomes)
    assert result.cases == THOROUGH and not result.failures


def test_a_process_that_dies_or_complains_is_a_failure(tmp_path, monkeypatch):
    """The runner itself: what it reports when a case kills its process."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'faults.fuzz' in ' '.join(sys.orig_argv):\n"
        '    print(\'{"kind": "yaml", "start": \' + sys.orig_argv[-3] + \'}\', flush=True)\n'
        "    os.kill(os.getpid(), 11)\n"
    )
    monkeypatch.setattr("faults.runner.TESTS", tmp_path / "site" / "tests")
    (tmp_path / "site" / "tests").mkdir()
    result = fuzz(["yaml"], 0, 2, tmp_path)["yaml"]
    assert result.cases == 2 and result.outcomes == {"failed": 2}
    assert all("died with code -11" in failure for failure in result.failures)
