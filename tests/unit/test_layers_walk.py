"""From a module to its sites."""

import pytest
import torch
from torch import nn

import toys
from brushstroke.errors import AttachError
from brushstroke.layers import find_sites, unwrap
from brushstroke.layers.walk import site_kind, site_module, weight_dxh


def test_sites_of_a_llama(llama):
    sites = {site.path: site for site in find_sites(llama)}
    assert len(sites) == 2 * 7 + 1
    down = sites["model.layers.0.mlp.down_proj"]
    assert (down.kind, down.shape, down.name) == ("linear", (48, 32), "down_proj")
    assert sites["lm_head"].is_output
    assert sites["lm_head"].tied_to is None
    assert not down.is_output
    assert next(iter(sites)) == "model.layers.0.self_attn.q_proj"


def test_sites_of_a_gpt2(gpt2):
    sites = {site.path: site for site in find_sites(gpt2)}
    assert len(sites) == 2 * 4 + 1
    fused = sites["transformer.h.0.attn.c_attn"]
    assert (fused.kind, fused.shape) == ("conv1d", (32, 96))
    assert sites["lm_head"].tied_to == "transformer.wte"
    assert sites["lm_head"].kind == "linear"


def test_a_tied_head_knows_its_embedding(tied_llama):
    sites = {site.path: site for site in find_sites(tied_llama)}
    assert sites["lm_head"].tied_to == "model.embed_tokens"


def test_other_modules_are_no_sites():
    net = nn.Sequential(
        nn.Embedding(4, 4), nn.Conv1d(4, 4, 1), nn.LayerNorm(4), nn.Bilinear(4, 4, 4), nn.ReLU()
    )
    assert find_sites(net) == []


def test_a_class_that_is_only_called_conv1d_is_no_site():
    class Conv1D(nn.Module):
        weight = torch.zeros(3, 3)

    assert site_kind(Conv1D()) is None
    assert site_kind(toys.Conv1D(4, 6)) == "conv1d"


@pytest.mark.parametrize(("module", "kind"), [(nn.Linear(6, 4), "linear"), (toys.Conv1D(4, 6), "conv1d")])
def test_weights_are_seen_as_dxh(module, kind):
    W = weight_dxh(module, kind)
    assert W.shape == (6, 4)
    x = torch.randn(3, 6)
    torch.testing.assert_close(x @ W + module.bias, module(x))
    assert W.data_ptr() == module.weight.data_ptr()


def test_packed_weights_are_none():
    module = nn.Linear(6, 4)
    module.weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)
    assert weight_dxh(module, "linear") is None
    module.weight = nn.Parameter(torch.zeros(12, 1))
    assert weight_dxh(module, "linear") is None


def test_the_module_itself_can_be_the_site():
    linear = nn.Linear(6, 4)
    (site,) = find_sites(linear)
    assert site.path == ""
    assert site_module(linear, "") is linear


def test_unwrapping():
    net = toys.Mlp()

    class Base:
        model = net

    assert unwrap(net) is unwrap(Base()) is unwrap(torch.compile(net)) is net
    for other in (None, "gpt2", 3):
        with pytest.raises(AttachError, match=r"expected an nn\.Module or a Base"):
            unwrap(other)


def test_a_missing_module_has_a_hint():
    with pytest.raises(AttachError, match=r"no module 'fc11'.*did you mean 'fc1'"):
        site_module(toys.Mlp(), "fc11")


def test_walking_changes_nothing(llama):
    before = toys.snapshot(llama)
    find_sites(llama)
    assert toys.snapshot(llama) == before
