"""Weights in eight bits, beside the ones that they were rounded from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import save_tiny
from torch import nn

from infllm_agent import AgentRuntime
from infllm_agent.errors import SessionMismatch
from infllm_agent.model.local_model import LocalModel
from infllm_agent.model.weights import FEW_ROWS, Int8Linear, RowLinear, to_int8, to_rows


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 2 * FEW_ROWS),
    inputs=st.integers(1, 70) | st.integers(1, 8).map(lambda n: 16 * n),
    outputs=st.integers(1, 70),
    bias=st.booleans(),
    bfloat16=st.booleans(),
)
def test_it_is_the_layer_of_the_rounded_weights(
    seed: int, rows: int, inputs: int, outputs: int, bias: bool, bfloat16: bool
) -> None:
    """Whichever product is used: the result is that of weights that are off by half a step at most."""
    torch.manual_seed(seed)
    layer = nn.Linear(inputs, outputs, bias=bias)
    layer.weight.data[0] = 0
    layer = layer.to(torch.bfloat16 if bfloat16 else torch.float32)
    rounded = Int8Linear(layer.weight, layer.bias)
    widened = rounded.weight.double() * rounded.scale.double().unsqueeze(1)
    step = layer.weight.double().abs().amax(dim=1, keepdim=True) / 127
    slack = 0.5 + 127 / 256 if bfloat16 else 0.5001  # the factors are bfloat16, too
    assert bool(((widened - layer.weight.double()).abs() <= slack * step).all())
    x = torch.randn(2, rows, inputs).to(layer.weight.dtype)
    for part in (x, x[:1, :1]):
        added = torch.zeros(outputs) if layer.bias is None else layer.bias.detach()
        expected = part.double() @ widened.T + added.double()
        size = part.double().abs() @ widened.abs().T + added.double().abs() + 1e-3
        assert bool(((rounded(part).double() - expected).abs() <= (0.02 if bfloat16 else 1e-5) * size).all())


@pytest.fixture(scope="module")
def smollm2() -> tuple[LocalModel, LocalModel]:
    return LocalModel.load(device="cpu"), LocalModel.load(device="cpu", dtype="int8")


def test_a_model_in_eight_bits_says_much_the_same(smollm2: tuple[LocalModel, LocalModel]) -> None:
    exact, rounded = smollm2
    linears = [m for m in rounded.model.modules() if isinstance(m, nn.Linear | Int8Linear)]
    assert linears
    assert all(isinstance(m, Int8Linear) for m in linears)
    text = "The agent restarted the web server at nine, and the queue was empty again by ten past nine. " * 4
    ids = exact.tokenizer.encode(text)
    logits = [model.forward_all(ids, model.new_memory()) for model in smollm2]
    shares = [each.log_softmax(-1) for each in logits]
    drift = (shares[0].exp() * (shares[0] - shares[1])).sum(-1).mean()
    assert float(drift) < 0.01, "nats of divergence a token"
    assert float((logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean()) > 0.9
    memory = rounded.new_memory()
    for token in ids[:40]:  # one by one: the other product
        last = rounded.forward([token], memory)
    alone = last.log_softmax(-1)
    assert float((alone.exp() * (alone - shares[1][39])).sum()) < 0.01


def test_all_of_a_model_is_told_apart(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    exact = LocalModel.load(str(folder), device="cpu", dtype="auto")
    rounded = LocalModel.load(str(folder), device="cpu", dtype="int8")
    bytes_of = [sum(p.nbytes for m in model.model.modules() if isinstance(m, nn.Linear | Int8Linear)
                    for p in m.parameters(recurse=False)) for model in (exact, rounded)]  # fmt: skip
    assert bytes_of[1] < 0.6 * bytes_of[0]
    with AgentRuntime(tmp_path / "root", exact) as runtime:
        runtime.session("ops").append_user("hello")
    with AgentRuntime(tmp_path / "root", rounded) as runtime, pytest.raises(SessionMismatch, match="weights"):
        runtime.session("ops")


def test_layers_of_other_kinds_stay(smollm2: tuple[LocalModel, LocalModel]) -> None:
    model = nn.Sequential(nn.Embedding(4, 8), nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 2)))
    to_int8(model)
    assert [type(m) for m in model] == [nn.Embedding, nn.LayerNorm, nn.Sequential]
    assert isinstance(model[2][0], Int8Linear)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_is_as_many(bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(48, 33, bias=bias)).to(dtype)
    weights = model.state_dict()
    x = torch.randn(1, 5, 48).to(dtype)
    expected = model(x)
    to_rows(model)
    assert isinstance(model[0], RowLinear)
    assert model.state_dict().keys() == weights.keys()
    assert torch.equal(model(x), expected), "several rows go as before"
    for row in range(5):
        assert model(x[:, row : row + 1]).shape == (1, 1, 33)
        torch.testing.assert_close(model(x[:, row : row + 1]), expected[:, row : row + 1])
        assert model(x[0, row]).shape == (33,)
