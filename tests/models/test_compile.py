"""The whole training forward is one graph: nothing in it waits for the host."""

import pytest
import torch

from s2d3d import convert_to_mof_, create_model


@pytest.mark.parametrize("name, kwargs", [("point_bert_tiny", dict(num_group=8)), ("point_transformer_tiny", {})])
def test_a_sparse_model_in_training_compiles_without_a_break(name, kwargs):
    torch.compiler.reset()
    model = create_model(name, num_classes=5, head_dropout=0.0, **kwargs)
    convert_to_mof_(model)
    compiled, points = torch.compile(model.train(), fullgraph=True, backend="eager"), torch.rand(4, 64, 3)
    outputs, gradients = [], []
    for network in (model, compiled):
        torch.manual_seed(1)  # the same partition of the tokens
        outputs.append(network(points))
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), list(model.parameters())))
    torch.testing.assert_close(outputs[0], outputs[1])
    for eager, traced in zip(*gradients, strict=True):
        torch.testing.assert_close(traced, eager)
