"""The examples of docs/integrations.md, run as they stand."""

import re
import warnings

import pytest
import torch

from s2d3d import is_sparse


def examples(repository) -> list[str]:
    text = (repository / "docs" / "integrations.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(("number", "library"), [*enumerate(["transformers", "lightning", "accelerate"])])
def test_an_example_trains_averages_and_merges(number, library, repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = examples(repository)
    assert len(blocks) == 3 and library in blocks[number]
    left: dict = {"__name__": "example"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few workers and batches
        exec(compile(blocks[number], library, "exec"), left)
    if library == "transformers":
        (callback,) = (one for one in left["trainer"].callback_handler.callbacks if hasattr(one, "num_steps"))
        assert callback.num_steps == left["trainer"].state.max_steps == 4 and not is_sparse(left["trainer"].model)
        final = type(left["dense"]).from_pretrained("run_vit/checkpoint-4")
        assert torch.equal(weights(final), weights(left["trainer"].model))
    elif library == "lightning":
        assert left["callback"].num_steps == left["trainer"].global_step == 4
    else:
        assert left["ewa"].num_steps == left["ewa"].total_steps == 4
    assert not is_sparse(left["dense"]) and bool(torch.isfinite(weights(left["dense"])).all())
