"""Cases of a test that run by default, and those that only a thorough run tries."""

from collections.abc import Sequence

import pytest


def quick(count: int, cases: Sequence[object]) -> list[object]:
    """Return the cases of a parametrised test; all after the first `count` are slow.

    The first ones are of different branches; the others are further values of these.
    """
    return [case if index < count else _slow(case) for index, case in enumerate(cases)]


def _slow(case: object) -> object:
    if isinstance(case, type(pytest.param())):
        return pytest.param(*case.values, id=case.id, marks=[*case.marks, pytest.mark.slow])
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
