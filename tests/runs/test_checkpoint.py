"""Checkpoints: whole or not at all, read as data, rebuilt as the model that was saved."""

import os
import pickle
import random

import pytest
import torch
from tiny_onnx import write_tiny_model

from s2d3d import MoFConfig, convert_to_mof_, create_model, is_sparse, load_checkpoint, load_model, merge_experts
from s2d3d import save_checkpoint as save
from s2d3d.errors import InputError
from s2d3d.runs import checkpoint as module
from s2d3d.runs.checkpoint import MODEL_KEYS, load_weights_, model_payload
from s2d3d.version import __version__

KWARGS = dict(
    trans_dim=24, depth=2, num_heads=2, num_group=12, group_size=8, encoder_dims=16, encoder_width=8, init_std=0.2,
    drop_path_rate=0.0,
)  # fmt: skip
EXPERTS = {
    "dense": None,
    "rup": MoFConfig(3, ("*.mlp",), 2, init="independent"),
    "topk": MoFConfig(4, ("*.mlp",), 1, init="independent", kind="topk", top_k=3, capacity_factor=1.5),
}
CLASSES = ["bowl", "cup", "vase"]


def payload_of(kind: str = "rup") -> tuple[torch.nn.Module, dict]:
    """A model with experts that differ, in eval mode, and its checkpoint."""
    model = create_model("point_bert_tiny", num_classes=3, **KWARGS)
    if EXPERTS[kind]:
        convert_to_mof_(model, EXPERTS[kind])
    payload = model_payload(
        model, name="point_bert_tiny", in_channels=3, kwargs=KWARGS, class_names=CLASSES, mof=EXPERTS[kind],
        config={"seed": 0},
    )  # fmt: skip
    return model.eval(), payload


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


def same(first, second) -> bool:
    """Equality of what checkpoints hold."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return first == second


# Round trip


@pytest.mark.parametrize("kind", EXPERTS)
def test_the_model_that_was_saved_is_rebuilt(path, kind):
    model, payload = payload_of(kind)
    assert save(path, payload) == path
    rebuilt = load_model(path)
    assert is_sparse(rebuilt) == (kind != "dense") and not rebuilt.training
    assert same(dict(rebuilt.state_dict()), dict(model.state_dict()))
    points = torch.randn(3, 32, 3)
    assert torch.equal(rebuilt(points), model(points))
    # In training too: number of experts, chosen layers and router are part of the file.
    torch.manual_seed(1)
    expected = model.train()(points)
    torch.manual_seed(1)
    assert torch.equal(rebuilt.train()(points), expected)


def test_content_comes_back_with_the_version_that_wrote_it(path):
    _, payload = payload_of()
    loaded = load_checkpoint(save(path, payload | {"progress": {"epoch": 3}}))
    assert loaded.pop("s2d3d_version") == __version__ and loaded.pop("format") == "s2d3d"
    assert loaded.pop("format_version") == 2 and loaded.pop("versions")["torch"] == torch.__version__.partition("+")[0]
    assert same(loaded, payload | {"progress": {"epoch": 3}})
    assert set(payload) == set(MODEL_KEYS)
    assert payload["s2d"] == {"kind": "rup", "num_experts": 3, "targets": ["*.mlp"], "every": 2}


def test_merge_on_loading_is_merge_experts(path):
    model, payload = payload_of("rup")
    save(path, payload)
    merged, expected = load_model(path, merge=True), merge_experts(model)
    assert not is_sparse(merged) and same(dict(merged.state_dict()), dict(expected.state_dict()))
    _, dense = payload_of("dense")
    assert same(dict(load_model(save(path, dense), merge=True).state_dict()), dict(dense["state_dict"]))


def test_merging_a_routed_model_is_refused_on_loading(path):
    save(path, payload_of("topk")[1])
    with pytest.raises(InputError, match=f"^{path}: was trained with s2d.kind=topk, it has no dense form"):
        load_model(path, merge=True)


def test_experts_of_before_there_were_kinds_are_rup(path):
    model, payload = payload_of("rup")
    del payload["s2d"]["kind"]
    points = torch.randn(2, 32, 3)
    assert torch.equal(load_model(save(path, payload), merge=True)(points), merge_experts(model)(points))


# Written whole or not at all


class Crash(Exception):
    """The machine dies here."""


def crash_while_writing(monkeypatch):
    def save_half(payload, file):
        file.write(b"half of a new fi")
        raise Crash

    monkeypatch.setattr(torch, "save", save_half)


def crash_while_flushing(monkeypatch):
    def fail(descriptor):
        raise Crash

    monkeypatch.setattr(os, "fsync", fail)


def crash_while_replacing(monkeypatch):
    def fail(source, target):
        raise Crash

    monkeypatch.setattr(os, "replace", fail)


@pytest.mark.parametrize("crash", [crash_while_writing, crash_while_flushing, crash_while_replacing])
def test_a_crash_leaves_the_old_file_and_nothing_else(path, monkeypatch, crash):
    save(path, payload_of()[1])
    before = path.read_bytes()
    crash(monkeypatch)
    with pytest.raises(Crash):
        save(path, payload_of()[1])
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_the_new_content_is_on_disk_before_it_takes_the_place(path, monkeypatch):
    """Without that order a power cut leaves an empty file under the final name."""
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    save(path, payload_of()[1])
    assert calls == ["fsync", "replace", "fsync"], "content, then name, then the folder that holds the name"


# What cannot be read


def refusal(path, load=load_checkpoint) -> str:
    with pytest.raises(InputError) as caught:
        load(path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def test_newer_format_names_both_versions(path, monkeypatch):
    monkeypatch.setattr(module, "FORMAT_VERSION", 7)
    save(path, payload_of()[1])
    monkeypatch.undo()
    assert refusal(path) == f"checkpoint format 7, this s2d3d {__version__} reads up to 2; update s2d3d"


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], torch.zeros(2), {"format": "other"}, "s2d3d", None])
def test_other_programs_files(path, content):
    torch.save(content, path)
    assert refusal(path) == "not a checkpoint of s2d3d; it needs one written by tools/train.py or tools/merge.py"


@pytest.mark.parametrize("key", MODEL_KEYS)
def test_every_part_is_needed(path, key):
    payload = payload_of()[1]
    del payload[key]
    assert refusal(save(path, payload)) == f"checkpoint is incomplete, {key} missing"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", ["point_bert_tiny"]), ("s2d", "rup"), ("state_dict", [torch.zeros(1)]), ("state_dict", {"a": 1}),
        ("class_names", "bowl"), ("class_names", [1, 2, 3]), ("class_names", ["a", "b"]), ("config", None),
        ("class_names", ["a", "b", "a"]), ("trained_files", [1]),
    ],
)  # fmt: skip
def test_parts_of_another_kind(path, key, value):
    save(path, payload_of()[1] | {key: value})
    assert refusal(path) == f"checkpoint is damaged, its {key} cannot be what s2d3d wrote"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: p["model"].update(name="point_brt"), "unknown model 'point_brt'; did you mean 'point_bert'?"),
        (lambda p: p["model"].pop("num_classes"), "'num_classes'"),
        (lambda p: p["model"]["kwargs"].update(depht=2), "model 'point_bert_tiny' has no parameter 'depht'"),
        (lambda p: p["model"]["kwargs"].update(num_heads=5), "num_heads is 5, must divide trans_dim 24"),
        (lambda p: p["model"]["kwargs"].update(depth="two"), ""),
        (lambda p: p["s2d"].update(num_experts=0), "num_experts is 0, must be at least 1"),
        (lambda p: p["s2d"].update(targets=["*.ffn"]), "no module matches '*.ffn'"),
        (lambda p: p["s2d"].pop("every"), "'every'"),
    ],
)
def test_unusable_descriptions(path, change, reason):
    payload = payload_of()[1]
    payload["model"]["kwargs"] = dict(KWARGS)
    change(payload)
    save(path, payload)
    message = refusal(path, load_model)
    assert message.startswith(f"the checkpoint's model description is unusable ({reason}") and message.endswith(")")


def test_weights_that_do_not_fit_are_counted_and_named(path):
    payload = payload_of("dense")[1]
    weights = payload["state_dict"]
    del weights["norm.bias"]
    weights["extra.a"] = weights["extra.b"] = torch.zeros(1)
    weights["cls_token"] = torch.zeros(1, 1, 25)
    save(path, payload)
    assert refusal(path, load_model) == (
        "does not fit the model: 1 weights missing (such as 'norm.bias'), 2 unknown weights (such as 'extra.a'), "
        "1 weights of another shape (such as 'cls_token')"
    )


def test_sparse_weights_do_not_fit_a_dense_model():
    model = create_model("point_bert_tiny", num_classes=3, **KWARGS)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        InputError, match=r"^a\.pt: does not fit the model: 4 weights of another shape \(such as 'blocks"
    ):
        load_weights_(model, payload_of("rup")[1]["state_dict"], where="a.pt")
    assert same(dict(model.state_dict()), before)


def test_paths_that_are_no_file(path, tmp_path):
    assert refusal(path) == "no such checkpoint file"
    assert refusal(tmp_path) == f"is a folder; name the file, such as {tmp_path}/merged.pt"
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "merged.pt").touch()
    assert refusal(tmp_path / "run" / "checkpoints").endswith(f"such as {tmp_path}/run/merged.pt")


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999])
def test_truncated_files(path, share):
    save(path, payload_of()[1])
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert refusal(path).startswith("cannot be read as a checkpoint (truncated, damaged or something else: ")


def test_a_changed_byte_is_noticed_or_changes_nothing(path):
    """torch itself reads flipped bits of a weight as another weight."""
    save(path, payload_of()[1])
    content, expected = path.read_bytes(), load_checkpoint(path)
    random.seed(0)
    weight = expected["state_dict"]["blocks.blocks.1.mlp.fc1.weight"].numpy().tobytes()
    inside = content.index(weight) + 17
    noticed = 0
    for position in [inside, *random.sample(range(len(content)), 60)]:
        changed = bytearray(content)
        changed[position] ^= 1 << random.randrange(8)
        path.write_bytes(changed)
        try:
            assert same(load_checkpoint(path), expected), position
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            noticed += 1
        if position == inside:
            assert noticed == 1
            assert not same(torch.load(path, weights_only=True)["state_dict"], expected["state_dict"])
    assert noticed > 20


# Hostile files


class Call:
    """Pickles to a call of a function."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def attacks(victim):
    """Each way in makes the file `victim` when it works."""
    yield "system", Call(os.system, f"touch {victim}")
    yield "open", Call(open, str(victim), "w")
    yield "eval", Call(eval, f"open({str(victim)!r}, 'w')")
    yield "mkdir", Call(os.mkdir, str(victim))
    yield "getattr", Call(getattr, Call(__import__, "os"), "getcwd")


@pytest.mark.parametrize("name", ["system", "open", "eval", "mkdir", "getattr"])
@pytest.mark.parametrize("wrap", ["checkpoint", "zip", "legacy", "pickle"])
def test_code_in_a_file_is_never_run(path, tmp_path, name, wrap):
    victim = tmp_path / "executed"
    attack = dict(attacks(victim))[name]
    if wrap == "checkpoint":
        torch.save(payload_of()[1] | {"format": "s2d3d", "format_version": 1, "history": [attack]}, path)
    elif wrap == "pickle":
        path.write_bytes(pickle.dumps({"format": "s2d3d", "history": attack}, protocol=2))
    else:
        torch.save({"format": "s2d3d", "a": attack}, path, _use_new_zipfile_serialization=wrap == "zip")
    assert refusal(path).startswith("cannot be read as a checkpoint (it is more than data: its pickle calls ")
    assert not victim.exists()
    # The attack is a real one: a reader that trusts the file runs it.
    if name in ("open", "mkdir"):
        torch.load(path, weights_only=False) if wrap != "pickle" else pickle.loads(path.read_bytes())
        assert victim.exists()


# Safetensors


@pytest.mark.parametrize("kind", EXPERTS)
def test_safetensors_hold_the_same_model_and_can_be_read_without_this_package(tmp_path, kind):
    from safetensors.torch import load_file

    path = tmp_path / "model.safetensors"
    model, payload = payload_of(kind)
    assert save(path, payload | {"progress": {"epoch": 3}}) == path
    assert same(load_file(path), payload["state_dict"])
    loaded = load_checkpoint(path)
    assert "progress" not in loaded and loaded["format_version"] == 2
    assert same({key: loaded[key] for key in MODEL_KEYS}, payload)
    points = torch.randn(2, 32, 3)
    assert torch.equal(load_model(path)(points), model(points))


def test_safetensors_that_are_damaged_or_of_other_programs(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save(path, payload_of()[1])
    content = path.read_bytes()
    for broken in (b"", content[:5], content[: len(content) // 2], b"\xff" * 100, content[:8] + b"[" + content[9:]):
        path.write_bytes(broken)
        assert refusal(path).startswith("cannot be read as safetensors (truncated, damaged or something else: ")
    save_file({"a": torch.zeros(3)}, path)
    assert refusal(path) == "holds weights but no description by s2d3d; it needs one of merge.py"
    save_file({"a": torch.zeros(3)}, path, metadata={"s2d3d": "[1]"})
    assert refusal(path).startswith("cannot be read as safetensors (")
    save_file({"a": torch.zeros(3)}, path, metadata={"s2d3d": "{}"})
    assert refusal(path).startswith("holds weights but no description by s2d3d")
    assert refusal(tmp_path / "absent.safetensors") == "no such checkpoint file"


def test_an_exported_program_is_named(tmp_path):
    path = tmp_path / "model.pt"
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(path)
    assert refusal(path) == "is an exported program, not a checkpoint; name merged.pt of the run, or weights"
    for path in (tmp_path / "model.onnx", tmp_path / "renamed.pt", tmp_path / "cut.ONNX"):
        write_tiny_model(path, ["a", "b"])
        path.write_bytes(path.read_bytes()[: 0 if path.stem == "cut" else None])
        assert refusal(path) == "is an exported program, not a checkpoint; name merged.pt of the run, or weights"
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), tmp_path / "model.pt2")
    assert (
        refusal(tmp_path / "model.pt2")
        == "is an exported program, not a checkpoint; name merged.pt of the run, or weights"
    )
