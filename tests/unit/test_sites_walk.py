"""Finding the sites of a module."""

import pytest
import torch
from torch import nn

import toys
from brushstroke.errors import AttachError
from brushstroke.sites import find_others, find_sites, kind_of, site_module, unwrap, weight_dxh


def test_sites_of_a_llama(llama):
    sites = {site.path: site for site in find_sites(llama)}
    assert len(sites) == 1 + 2 * 7 + 1
    down = sites["model.layers.0.mlp.down_proj"]
    assert (down.kind, down.shape, down.name) == ("linear", (48, 32), "down_proj")
    assert sites["lm_head"].is_output
    assert sites["lm_head"].tied_to is None
    assert not down.is_output
    words = sites["model.embed_tokens"]
    assert (words.kind, words.shape, words.in_groups) == ("embedding", (64, 32), False)
    assert list(sites)[:2] == ["model.embed_tokens", "model.layers.0.self_attn.q_proj"]


def test_sites_of_a_gpt2(gpt2):
    sites = {site.path: site for site in find_sites(gpt2)}
    assert len(sites) == 2 + 2 * 4 + 1
    fused = sites["transformer.h.0.attn.c_attn"]
    assert (fused.kind, fused.shape) == ("conv1d", (32, 96))
    assert sites["lm_head"].tied_to == "transformer.wte"
    assert sites["lm_head"].kind == "linear"


def test_tied_head_has_its_embedding_as_tie(tied_llama):
    sites = {site.path: site for site in find_sites(tied_llama)}
    assert sites["lm_head"].tied_to == "model.embed_tokens"


def test_other_modules_are_not_sites():
    modules = nn.EmbeddingBag(4, 4), nn.Conv1d(4, 4, 1), nn.LayerNorm(4), nn.Bilinear(4, 4, 4), nn.ReLU()
    assert find_sites(nn.Sequential(*modules)) == []


def test_other_class_named_conv1d_is_not_a_site():
    class Conv1D(nn.Module):
        weight = torch.zeros(3, 3)

    assert kind_of(Conv1D()) is None
    assert kind_of(toys.Conv1D(4, 6)).name == "conv1d"


@pytest.mark.parametrize("module", [nn.Linear(6, 4), toys.Conv1D(4, 6)])
def test_weights_are_seen_as_dxh(module):
    W = weight_dxh(module)
    assert W.shape == (6, 4)
    x = torch.randn(3, 6)
    torch.testing.assert_close(x @ W + module.bias, module(x))
    assert W.data_ptr() == module.weight.data_ptr()


def test_quantised_weights_return_none():
    module = nn.Linear(6, 4)
    module.weight = nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)
    assert weight_dxh(module) is None
    module.weight = nn.Parameter(torch.zeros(12, 1))
    assert weight_dxh(module) is None


def test_others_lists_all_weights_that_are_not_sites(llama):
    others = {other.path: other for other in find_others(llama, find_sites(llama))}
    sites = {site.path for site in find_sites(llama)}
    paths = {path for path, _ in llama.named_modules()}
    assert others.keys() == paths - sites
    assert not [other for other in others.values() if other.has_weight]
    assert others["model.layers.1.self_attn"].sites_below == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert others["model.norm"].reason == "a LlamaRMSNorm, which cannot be adapted yet"


def test_other_weights_have_their_axes():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.up = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(2, 4, 3))
            self.bias = nn.Parameter(torch.zeros(3))

    net = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 1), "experts": Experts(), "words": nn.Embedding(4, 4)})
    found = {other.path: other.kind for other in find_others(net, []) if other.has_weight}
    assert found == {"conv": "Conv1d", "experts": "Experts", "experts.up": "bare 3-D parameter"}


def test_submodules_of_sites_belong_to_them_and_shared_weights_count_once():
    conv = nn.Conv1d(4, 4, 1)
    net = nn.ModuleDict({"a": conv, "b": conv, "fc": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))})
    others = {other.path: other for other in find_others(net, find_sites(net))}
    assert set(others) == {"", "a", "b"}
    assert others["a"].has_weight
    assert not others["b"].has_weight


def test_trial_runs_one_module_of_each_class_with_custom_forward():
    class Counted(nn.Linear):
        runs = 0

        def forward(self, x):
            Counted.runs += 1
            assert not self.training
            return super().forward(x)

    net = nn.Sequential(*(Counted(4, 4) for _ in range(3)), nn.Linear(4, 4)).train()
    assert not [site for site in find_sites(net) if site.bypassed]
    assert Counted.runs == 1
    find_sites(net, trial=False)
    assert Counted.runs == 1
    assert all(module.training for module in net)
    net.to("meta")
    find_sites(net)
    assert Counted.runs == 1


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


def test_finding_sites_changes_nothing(llama):
    before = toys.snapshot(llama)
    find_sites(llama)
    assert toys.snapshot(llama) == before
