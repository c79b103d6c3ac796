import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2d3d.datasets import BatchLoader, PointCloudDataset, build_augmentation, same_data, split_train_validation
from s2d3d.datasets.selection import select_classes, stratified_fraction
from s2d3d.datasets.transforms import normalize_stored
from s2d3d.errors import InputError
from s2d3d.ops.points import farthest_point_sample, gather_points
from s2d3d.random_state import derived_generator

NAMES = ["apple", "boat", "chair"]


def make(clouds, *, count=12, stored=16, num_points=16, split="train", dtype="float32", **kwargs):
    points = torch.from_numpy(clouds(count, stored, dtype))
    kwargs.setdefault("normalize", False)
    return PointCloudDataset(points, torch.arange(count) % 3, NAMES, split=split, num_points=num_points, **kwargs)


def rows(cloud: torch.Tensor) -> list[tuple[float, ...]]:
    return sorted(map(tuple, cloud.tolist()))


def test_as_many_points_as_stored_training_shuffles_each_sample_and_a_test_does_not(clouds):
    stored = torch.from_numpy(clouds(12, 16))
    points, labels = make(clouds).batch(torch.arange(12), generator=derived_generator(0))
    assert labels.tolist() == [0, 1, 2] * 4 and labels.dtype == torch.int64
    assert points.shape == (12, 16, 3) and points.dtype == torch.float32 and points.is_contiguous()
    orders = set()
    for cloud, original in zip(points, stored):
        assert rows(cloud) == rows(original)
        orders.add(tuple(int((original == p).all(1).nonzero()) for p in cloud))
    assert len(orders) == 12 and tuple(range(16)) not in orders
    assert make(clouds, split="test").batch(torch.arange(12))[0].equal(stored)


@pytest.mark.parametrize(
    ("stored", "num_points", "prefix"), [(64, 20, 24), (22, 20, 22), (21, 20, 21), (5, 1, 1), (5, 3, 3)]
)
def test_fewer_points_than_stored(clouds, stored, num_points, prefix):
    original = torch.from_numpy(clouds(6, stored))
    train = make(clouds, count=6, stored=stored, num_points=num_points)
    test = make(clouds, count=6, stored=stored, num_points=num_points, split="test")
    assert train.stored_points == stored
    for index, cloud in enumerate(original):
        order = farthest_point_sample(cloud[None], prefix)[0]
        plain, _ = test[index]
        assert plain.equal(cloud[order[:num_points]])
        allowed = set(rows(cloud[order]))
        drawn = [rows(train[index][0]) for _ in range(8)]
        assert all(len(set(sample)) == num_points and set(sample) <= allowed for sample in drawn)
        if prefix > num_points:
            assert len(set(map(tuple, drawn))) > 1


def test_a_random_subset_is_uniform(clouds):
    train = make(clouds, count=1, stored=30, num_points=10)
    prefix = [tuple(p) for p in train.points[0].tolist()]
    assert len(prefix) == 12
    points, _ = train.batch(torch.zeros(6000, dtype=torch.int64), generator=derived_generator(1))
    counts = torch.zeros(12)
    for cloud in points.tolist():
        for p in cloud:
            counts[prefix.index(tuple(p))] += 1
    assert (counts / 6000 - 10 / 12).abs().max() < 0.03


def test_more_points_than_stored_is_an_error_that_names_both(clouds):
    with pytest.raises(InputError, match=r"^here: 16 points stored .* 17; lower"):
        make(clouds, num_points=17, source="here")
    with pytest.raises(InputError, match="num_points is 0"):
        make(clouds, num_points=0)
    with pytest.raises(InputError, match="no shapes in split 'test'"):
        make(clouds, count=0, split="test")


def test_normalize_is_over_the_stored_points(clouds):
    original = torch.from_numpy(clouds(3, 40))
    test = make(clouds, count=3, stored=40, num_points=10, split="test", normalize=True)
    for index, cloud in enumerate(original):
        centered = cloud - cloud.mean(0)
        whole = centered / centered.norm(dim=1).max()
        expected = whole[farthest_point_sample(whole[None], 10)[0]]
        torch.testing.assert_close(test[index][0], expected)


def test_float16_stays_float16_in_memory_and_is_not_rounded_twice(clouds):
    raw = make(clouds, dtype="float16", normalize=True, split="test")
    assert raw.points.dtype == torch.float16 and raw[0][0].dtype == torch.float32
    assert raw.points.float().norm(dim=-1).amax(1).sub(1).abs().max() < 1e-3
    again = PointCloudDataset(raw.points, raw.labels, NAMES, split="test", num_points=16)
    assert again.points.equal(raw.points)


def test_augment_argument(clouds):
    def double(points, generator):
        return points * 2

    index = torch.arange(4)
    stored = torch.from_numpy(clouds(12, 16))[:4]
    train, test = make(clouds, transform=double), make(clouds, transform=double, split="test")
    assert train.batch(index, augment=False)[0].equal(stored)
    augmented = train.batch(index, generator=derived_generator(0))[0]
    assert augmented.equal(train.batch(index, generator=derived_generator(0), augment=True)[0])
    assert rows(augmented[0]) == rows(stored[0] * 2) and not augmented.equal(stored * 2)
    assert test.batch(index)[0].equal(stored * 2)
    assert test.batch(index, augment=False)[0].equal(stored)
    assert rows(test.batch(index, augment=True, generator=derived_generator(0))[0][1]) == rows(stored[1] * 2)


def test_a_random_transform_of_a_test_set_is_repeatable(clouds):
    test = make(clouds, split="test", transform=build_augmentation(jitter=0.1))
    assert test.batch(torch.tensor([3, 1]))[0].equal(test.batch(torch.tensor([3, 1]))[0])
    assert test[2][0].equal(test[2][0])


def test_batches_depend_on_the_generator_alone(clouds):
    train = make(clouds, transform=build_augmentation())
    state = torch.get_rng_state()
    first = train.batch(torch.arange(5), generator=derived_generator(7))[0]
    torch.manual_seed(99)
    torch.set_rng_state(state)
    assert first.equal(train.batch(torch.arange(5), generator=derived_generator(7))[0])
    assert not first.equal(train.batch(torch.arange(5), generator=derived_generator(8))[0])
    train[0]
    assert torch.get_rng_state().equal(state)


def test_items_follow_the_seed_of_torch_and_move_on(clouds):
    def draw(seed):
        torch.manual_seed(seed)
        train = make(clouds, transform=build_augmentation())
        return [train[0][0] for _ in range(2)]

    first, again, other = draw(1), draw(1), draw(2)
    assert all(a.equal(b) for a, b in zip(first, again))
    assert not first[0].equal(first[1]) and not first[0].equal(other[0])


def test_a_set_says_what_it_is(clouds):
    whole = "data set: split train, 12 clouds of 10 points of 16 stored, 3 channels, 3 classes (apple, boat, chair)"
    assert str(make(clouds, num_points=10)) == f"{make(clouds, num_points=10)}" == whole
    many = PointCloudDataset(torch.rand(9, 4, 3), torch.arange(9), [*"abcdefgh", "\x1b"], split="test", num_points=4)
    assert str(many).endswith(" 9 clouds of 4 points, 3 channels, 9 classes (a, b, c, d, e, f, g, h, ...)")


def test_indexing(clouds):
    test = make(clouds, split="test")
    points, label = test[-1]
    assert type(label) is int and label == 2 and points.equal(test[11][0])
    for index in (12, -13):
        with pytest.raises(IndexError, match="of 12"):
            test[index]
    assert test.up_axis == "z" and test.num_classes == 3 and len(test.names) == len(test) == 12


def test_a_plain_data_loader_with_workers(clouds):
    train = make(clouds, transform=build_augmentation())

    def draw(seed):
        torch.manual_seed(seed)
        loader = torch.utils.data.DataLoader(train, batch_size=6, num_workers=2)
        return [batch for _ in range(2) for batch in loader]

    first, again = draw(3), draw(3)
    assert len(first) == 4 and all(a[0].equal(b[0]) for a, b in zip(first, again))
    assert not first[0][0].equal(first[2][0]), "the second epoch augments anew"
    assert first[0][0].shape == (6, 16, 3) and first[0][1].dtype == torch.int64


def test_pickling_after_use(clouds):
    train = make(clouds)
    train[0]
    back = pickle.loads(pickle.dumps(train))
    assert back.points.equal(train.points) and back[0][0].shape == (16, 3)


def test_subset_shares_storage_and_keeps_the_order_given(clouds):
    whole = make(clouds, split="test", names=[f"shape{i}" for i in range(12)])
    part = whole.subset([7, 2, 2])
    assert part._storage.data_ptr() == whole._storage.data_ptr()
    assert part.names == ["shape7", "shape2", "shape2"] and part.labels.tolist() == [1, 2, 2]
    assert part.points.equal(whole.points[[7, 2, 2]]) and part[1][0].equal(whole[2][0])
    deeper = part.subset(torch.tensor([0]))
    assert deeper.names == ["shape7"] and deeper[0][0].equal(whole[7][0])
    reversed_ = whole.subset(torch.arange(11, -1, -1))
    assert reversed_.points.equal(whole.points.flip(0))
    for bad in ([12], [-1], []):
        with pytest.raises(InputError, match="subset"):
            whole.subset(bad)


def test_split_train_validation(clouds):
    whole = make(clouds, count=60, transform=build_augmentation(), names=[str(i) for i in range(60)])
    train, val = split_train_validation(whole, 0.2, seed=5)
    assert sorted(train.names + val.names, key=int) == whole.names
    assert val.labels.bincount().tolist() == [4, 4, 4] and train.labels.bincount().tolist() == [16, 16, 16]
    assert (val.split, val.transform, val.training) == ("val", None, False)
    assert train.training and train.transform is whole.transform and whole.split == "train"
    assert val[3][0].equal(whole.points[int(val.names[3])])
    assert split_train_validation(whole, 0.2, seed=5)[1].names == val.names
    assert split_train_validation(whole, 0.2, seed=6)[1].names != val.names


def test_split_leaves_every_class_a_training_shape(clouds):
    train, val = split_train_validation(make(clouds, count=6), 0.99)
    assert train.labels.bincount().tolist() == [1, 1, 1] and len(val) == 3


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_split_fraction_out_of_range(clouds, fraction):
    with pytest.raises(InputError, match="validation fraction"):
        split_train_validation(make(clouds), fraction)


def test_split_that_would_be_empty(clouds):
    with pytest.raises(InputError, match=r"0\.01 of 12 shapes"):
        split_train_validation(make(clouds), 0.01)


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), fraction=st.floats(0.01, 1), seed=st.integers(0, 99)
)
def test_stratified_fraction(labels, fraction, seed):
    labels = torch.tensor(labels)
    chosen = stratified_fraction(labels, fraction, seed)
    assert chosen.equal(chosen.unique())
    for label in labels.unique():
        total, kept = int((labels == label).sum()), int((labels[chosen] == label).sum())
        assert kept == max(1, round(total * fraction))
    larger = stratified_fraction(labels, min(1.0, 2 * fraction), seed)
    assert set(chosen.tolist()) <= set(larger.tolist())


def test_stratified_fraction_depends_on_the_seed_and_its_range():
    labels = torch.arange(90) % 3
    assert not stratified_fraction(labels, 0.2, 0).equal(stratified_fraction(labels, 0.2, 1))
    for fraction in (0, 1.01, -1):
        with pytest.raises(InputError, match="fraction is"):
            stratified_fraction(labels, fraction, 0)


def test_select_classes_numbers_in_the_order_given():
    kept, labels = select_classes(torch.tensor([0, 1, 2, 1, 0]), NAMES, ["chair", "apple"])
    assert kept.tolist() == [0, 2, 4] and labels.tolist() == [1, 0, 1]
    with pytest.raises(InputError, match="unknown class 'chiar'; did you mean 'chair'"):
        select_classes(torch.tensor([0]), NAMES, ["apple", "chiar"])
    with pytest.raises(InputError, match="'boat' is named twice"):
        select_classes(torch.tensor([0]), NAMES, ["boat", "boat"])
    with pytest.raises(InputError, match="classes is empty"):
        select_classes(torch.tensor([0]), NAMES, [])


def test_derived_generators_differ_by_every_key_and_repeat():
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), ("0",), ("a", 1), ("a1",)]
    seeds = [derived_generator(*key).initial_seed() for key in keys]
    assert len(set(seeds)) == len(keys)
    assert torch.rand(3, generator=derived_generator(0, "x")).equal(torch.rand(3, generator=derived_generator(0, "x")))


def test_where_shared_memory_is_short_the_points_stay_private(clouds, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "free")
    monkeypatch.setattr("s2d3d.datasets.base.shutil.disk_usage", lambda path: usage(10))
    private = make(clouds, split="test")
    monkeypatch.setattr("s2d3d.datasets.base.shutil.disk_usage", lambda path: usage(10**12))
    shared = make(clouds, split="test")
    assert shared.points.is_shared() and not private.points.is_shared() and private.points.equal(shared.points)


# Normals and colours


def colored(count: int = 6, num_points: int = 40, dtype=torch.float32) -> torch.Tensor:
    """Make clouds whose normals are random and whose colours number the points."""
    generator = torch.Generator().manual_seed(5)
    xyz, normal = (torch.randn(count, num_points, 3, generator=generator) for _ in range(2))
    rgb = (torch.arange(num_points) / num_points)[:, None].expand(count, -1, 3)
    return torch.cat([xyz, torch.nn.functional.normalize(normal, dim=-1), rgb], -1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("num_points", [40, 20])
def test_channels_go_with_their_points_and_do_not_choose_them(num_points, dtype, tmp_path):
    points, labels = colored(dtype=dtype), torch.arange(6) % 2
    options = dict(num_points=num_points, cache_dirs=[tmp_path])
    full = PointCloudDataset(points, labels, ["a", "b"], channels="xyz+normal+rgb", **options)
    files = list(tmp_path.iterdir())
    plain = PointCloudDataset(points[..., :3].contiguous(), labels, ["a", "b"], **options)
    assert list(tmp_path.iterdir()) == files and bool(files) == (num_points < 40), "one selection for both"
    augment = build_augmentation(jitter=0.01, rotate=True)
    full.transform, plain.transform = build_augmentation(jitter=0.01, rotate=True, channels=full.channels), augment
    for own, other in zip(*(BatchLoader(part, 4, shuffle=True, seed=1) for part in (full, plain)), strict=True):
        assert own[0][..., :3].equal(other[0]) and own[1].equal(other[1])
    drawn = full.batch(torch.arange(6), augment=False)[0]
    numbers = (drawn[..., 6] * 40).round().long()
    assert drawn[..., 3:].equal(gather_points(points.float(), numbers)[..., 3:]), "normals and colours as they are"
    expected = gather_points(normalize_stored(points).float(), numbers)
    assert drawn.equal(expected) and full.subset([1]).channels == "xyz+normal+rgb"


def test_the_fingerprint_knows_the_channels():
    points = colored()
    options = dict(num_points=40, channels="xyz+normal+rgb")
    first = PointCloudDataset(points, torch.zeros(6), ["a"], **options).fingerprint()
    points[:, :, 3:6] = 0
    assert not same_data(first, PointCloudDataset(points, torch.zeros(6), ["a"], **options).fingerprint())


def test_clouds_of_other_channels_than_named_are_refused():
    with pytest.raises(InputError, match=r"^data set: its clouds have 9 channels, xyz are 3$"):
        PointCloudDataset(colored(), torch.zeros(6), ["a"], num_points=40)
