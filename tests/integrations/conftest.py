"""Fixtures of the tests with other trainers."""

import gc

import pytest

collect_ignore = ["small_lightning.py", "small_transformers.py"]  # no tests, and they load other trainers


@pytest.fixture(autouse=True, scope="session")
def _no_datasets():
    """`tests/` is on the path of the tests, and transformers takes its folder `datasets` for the package."""
    import transformers.trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.trainer, "is_datasets_available", lambda: False)
        yield


@pytest.fixture(autouse=True, scope="session")
def _short_collections():
    """Accelerate and Lightning collect garbage at each start; what was imported before need not be searched again."""
    gc.freeze()
    yield
    gc.unfreeze()
