"""The trial step before a run names sites without gradients, and changes nothing."""

from typing import Any

import pytest
import torch
from torch import nn

from brushstroke.adapter import LoraConfig
from brushstroke.base import Base
from brushstroke.training import TrainConfig, Training, plan
from brushstroke.training.trial import unlearnt_sites
from toys import tiny_gpt2, tiny_llama
from training_kit import examples


class Experts(nn.Module):
    """Two experts, the second of which no token of a trial gets, and a projection that may be detached."""

    def __init__(self, detach: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
        self.router = nn.Linear(32, 2)
        self.watcher, self.detach = nn.Linear(32, 32), detach

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        watched = self.watcher(x)
        gate = self.router(x).softmax(-1)[..., :1]
        return gate * self.experts[0](x) + (watched.detach() if self.detach else watched)


class Hashed(nn.Module):
    """Experts that are chosen by what goes in, without a weight beside them; three of many run."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleDict({f"expert_{i}": nn.Linear(32, 32) for i in range(40)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = int(x.sum().abs() * 1e6)
        return sum((self.experts[f"expert_{(first + i) % 40}"](x) for i in range(3)), torch.zeros(()))


class Unused(nn.Module):
    """A list of which every layer uses one member, as Zamba2 lists adapters of a shared block."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(32, 32) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts[0](x)


def model(*, detach: bool = False, tower: bool = False) -> nn.Module:
    made: Any = tiny_llama()
    for layer in made.model.layers:
        layer.mlp = Experts(detach)
    if tower:
        made.model.tower = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(8, 8)}) for _ in range(3)])
    return made


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, model])
def test_no_warning_if_all_sites_get_gradients(make: Any) -> None:
    with Training(make(), LoraConfig(rank=2)) as run:
        assert unlearnt_sites(run) == ()


def test_sites_without_gradient_are_named_once_for_all_layers() -> None:
    with Training(model(detach=True), LoraConfig(rank=2)) as run:
        (said,) = unlearnt_sites(run)
    assert said.startswith("the model gives no gradient to model.layers.*.mlp.watcher (2): a step in which")


def with_mlp(part: nn.Module, layer: int = 0) -> nn.Module:
    made: Any = tiny_llama()
    made.model.layers[layer].mlp = part
    return made


def test_routed_experts_are_not_reported() -> None:
    with Training(with_mlp(Hashed()), LoraConfig(rank=2)) as run:
        assert unlearnt_sites(run) == ()


def test_a_member_of_a_list_that_nothing_chooses_is_named() -> None:
    with Training(with_mlp(Unused()), LoraConfig(rank=2)) as run:
        (said,) = unlearnt_sites(run)
    assert said.startswith("text does not run through model.layers.0.mlp.parts.1: they are not trained")


def test_a_layer_whose_block_is_replaced_is_named_although_other_layers_run_theirs() -> None:
    made: Any = tiny_llama()
    made.model.layers[1].mlp.forward = lambda x: x
    with Training(made, LoraConfig(rank=2)) as run:
        (said,) = unlearnt_sites(run)
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert f"model.layers.1.mlp.{name}" in said


def test_experts_of_a_layer_that_runs_no_expert_are_named() -> None:
    made: Any = model()
    made.model.layers[1].mlp.forward = lambda x: x
    with Training(made, LoraConfig(rank=2, targets="experts\\..*")) as run:
        (said,) = unlearnt_sites(run)
    shown = "model.layers.*.mlp.experts.* (2 of 4)"
    assert said.startswith(f"text does not run through {shown}: they are not trained")


def test_sites_that_text_does_not_reach_are_named() -> None:
    with Training(model(tower=True), LoraConfig(rank=2)) as run:
        (said,) = unlearnt_sites(run)
    assert said.startswith("text does not run through model.tower.*.q_proj (3): they are not trained")
    with Training(model(tower=True), LoraConfig(rank=2, targets="self_attn.q_proj")) as run:
        assert unlearnt_sites(run) == ()


def test_plan_warns_of_sites_without_gradient_and_unreached_sites() -> None:
    config = TrainConfig(max_steps=1)
    made = plan(Base(model(detach=True, tower=True)), examples(), LoraConfig(rank=2), config)
    said = "\n".join(made.warnings)
    assert "mlp.watcher" in said
    assert "tower.*.q_proj" in said
    assert plan(Base(tiny_llama()), examples(), LoraConfig(rank=2), config).warnings == ()


def test_trial_step_changes_nothing() -> None:
    states = []
    for tried in (False, True):
        with Training(tiny_llama(), LoraConfig(rank=2, dropout=0.2)) as run:
            if tried:
                unlearnt_sites(run)
                assert run.steps == 0
                assert all(p.grad is None for p in run.parameters)
            for _ in range(2):
                run.forward_backward(examples())
                run.optim_step()
            states.append([p.detach().clone() for p in run.parameters])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_trial_ignores_a_nan_loss() -> None:
    broken: Any = tiny_llama()
    with Training(broken, LoraConfig(rank=2)) as run:
        with torch.no_grad():
            broken.lm_head.weight.fill_(float("nan"))
        assert unlearnt_sites(run) == ()
        assert all(p.grad is None for p in run.parameters)
