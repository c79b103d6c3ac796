"""Fixtures of the tests with other trainers."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def _no_datasets():
    """`tests/` is on the path of the tests, and transformers takes its folder `datasets` for the package."""
    import transformers.trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.trainer, "is_datasets_available", lambda: False)
        yield
