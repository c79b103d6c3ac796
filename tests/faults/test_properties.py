"""Properties for any input of a kind; hypothesis looks for one that breaks them, and shortens it."""

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from s2d3d import load_checkpoint, load_config, save_checkpoint
from s2d3d.config.load import dump_config
from s2d3d.datasets.h5 import inspect_h5, read_h5, read_rows, write_h5
from s2d3d.errors import InputError

FEW = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["5e-4", ".inf", "~", "no"]),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture
def base(repository):
    return repository / "configs" / "demo.yaml"


def places(mapping: dict, prefix: str = "") -> list[str]:
    found = []
    for key, value in mapping.items():
        found += places(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return found


def check(load, starts: tuple[str, ...], again) -> None:
    """Either a config that is read back as it is, or an error whose lines each say where."""
    try:
        config = load()
    except InputError as error:
        lines = str(error).splitlines()
        assert lines and all(line.startswith(starts) and line.isprintable() for line in lines), lines
        return
    again.write_text(dump_config(config), encoding="utf-8")
    assert load_config(again) == config


@given(data=st.data())
@FEW
def test_a_value_anywhere_in_a_config_is_right_or_named(data, base, tmp_path):
    config = load_config(base).to_dict()
    place = data.draw(st.sampled_from(places(config))).split(".")
    section = config
    for key in place[:-1]:
        section = section[key]
    section[data.draw(st.sampled_from([place[-1], "other"]))] = data.draw(TREES)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8", errors="replace")
    check(lambda: load_config(path), (str(path),), tmp_path / "again.yaml")


@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode(errors="replace")))
@FEW
def test_any_bytes_are_no_config_and_one_says_why(content, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert all(line.startswith(str(path)) and line.isprintable() for line in str(caught.value).splitlines())


@given(data=st.data())
@FEW
def test_any_override_is_right_or_named(data, base, tmp_path):
    keys = st.sampled_from(places(load_config(base).to_dict())) | st.text(max_size=12)
    overrides = data.draw(st.lists(st.tuples(keys, st.text(max_size=12) | SCALARS.map(str)), min_size=1, max_size=3))
    given_as = [f"{key}={value}" for key, value in overrides]
    check(lambda: load_config(base, given_as), ("override ", str(base)), tmp_path / "again.yaml")


@given(content=TREES)
@FEW
def test_what_a_checkpoint_holds_comes_back(content, tmp_path):
    weights = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7)}
    payload = {"model": {}, "s2d": None, "state_dict": weights, "class_names": ["x"], "config": {}}
    loaded = load_checkpoint(save_checkpoint(tmp_path / "a.pt", payload | {"extra": content}))
    assert repr(loaded["extra"]) == repr(content), "repr, because NaN is not equal to itself"
    assert all(torch.equal(loaded["state_dict"][key], weights[key]) for key in weights)


@given(
    count=st.integers(1, 7), points=st.integers(1, 9), half=st.booleans(), seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-7, 1.0, 1e4]), named=st.booleans(), masked=st.booleans(), data=st.data(),
)  # fmt: skip
@FEW
def test_any_clouds_are_read_as_they_were_written_whole_or_in_parts(
    count, points, half, seed, scale, named, masked, data, tmp_path
):
    rng = np.random.default_rng(seed)
    clouds = (scale * rng.normal(size=(count, points, 3))).astype(np.float16 if half else np.float32)
    labels, mask = rng.integers(0, 5, count), rng.integers(-1, 9, (count, points)) if masked else None
    names = [f"é {index}" for index in range(count)] if named else None
    write_h5(tmp_path / "a.h5", clouds, labels, names=names, mask=mask)
    whole, layout = read_h5(tmp_path / "a.h5", num_classes=5), inspect_h5(tmp_path / "a.h5", num_classes=5)
    np.testing.assert_array_equal(whole.points, clouds)
    assert whole.points.dtype == layout.dtype == clouds.dtype and layout.shape == clouds.shape
    assert whole.label.tolist() == layout.label.tolist() == labels.tolist()
    assert whole.names == layout.names == names and layout.has_mask == masked
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    np.testing.assert_array_equal(read_rows(layout, start, stop), clouds[start:stop])
