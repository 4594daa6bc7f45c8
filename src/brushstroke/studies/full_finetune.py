"""Training W itself at the chosen sites, with the verbs of `Training`: the arm that no rank limits."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from brushstroke.adapter import Adapter
from brushstroke.base import Base
from brushstroke.data import Example
from brushstroke.errors import ConfigError, NonFiniteError
from brushstroke.lowrank import LowRank
from brushstroke.packed.pack import Pass, Row
from brushstroke.packed.select import select_forward
from brushstroke.sites import KINDS, Site, find_sites, site_module, weight_dxh
from brushstroke.studies.arms import Arm, chosen_sites
from brushstroke.training import TrainConfig
from brushstroke.training.session import StepResult

MICRO_TOKENS = 1024


class FullFineTuning:
    """A training session on the weights themselves; `close` puts the old ones back, bit for bit.

    Args:
        base: float32 or float64.
        arm: whose targets learn.
        config: the settings of the optimiser.
        learning_rate: of AdamW.

    Raises:
        ConfigError: a base in half precision, whose small updates would be rounded away.
        TargetError: a pattern that selects nothing.
    """

    def __init__(self, base: Base, arm: Arm, config: TrainConfig, learning_rate: float) -> None:
        if base.dtype in (torch.float16, torch.bfloat16):
            raise ConfigError(
                f"the arm {arm.name!r} trains W itself, which needs float32; load the base so "
                "(--dtype float32), or leave the arm out (--no-whole)"
            )
        self._sites = chosen_sites(arm.targets, find_sites(base.model))
        self.clip = config.clip
        self.parameters = [_weight(base.model, site) for site in self._sites]
        self._kept = [weight.detach().clone() for weight in self.parameters]
        model = base.model.eval()
        for weight in self.parameters:
            weight.requires_grad_(True)
        self.forward, _ = select_forward(model, False, self.parameters)
        self.optimizer: Any = torch.optim.AdamW(
            self.parameters, learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self._pending_tokens = 0

    def passes(self, examples: Sequence[Example]) -> list[Pass]:
        """How examples are arranged over passes."""
        return self.forward.passes([Row.of(example) for example in examples], MICRO_TOKENS, False)

    def forward_backward(self, examples: Sequence[Example]) -> StepResult:
        """Add the gradients of these examples to those that wait for `optim_step`.

        Raises:
            NonFiniteError: the loss is not a finite number.
        """
        total, trained = 0.0, sum(example.trained for example in examples)
        real = sum(len(example) for example in examples)
        with self.forward.context():
            for part in self.passes(examples):
                value = self.forward.summed_loss(part, None)
                if not bool(torch.isfinite(value)):
                    raise NonFiniteError(f"the loss is {value.item()}; lower the learning rate")
                value.backward()
                total += value.item()
        self._pending_tokens += trained
        return StepResult(total / max(1, trained), trained, real, real)

    def optim_step(self, learning_rate: float) -> None:
        """One step on the gradients that wait.

        Raises:
            NonFiniteError: a gradient is not a finite number.
        """
        for weight in self.parameters:
            if weight.grad is not None:
                weight.grad.div_(self._pending_tokens)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip or float("inf"))
        if not bool(torch.isfinite(norm)):
            raise NonFiniteError("a gradient is not a finite number; lower the learning rate")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._pending_tokens = 0

    def adapter(self) -> Adapter:
        """ΔW of every site as factors of its full rank min(d, h), float32."""
        updates = {}
        for site, weight, old in zip(self._sites, self.parameters, self._kept, strict=True):
            delta = (weight.detach().double() - old.double()).cpu()
            delta = KINDS[site.kind].to_dxh(delta)
            left, sigma, right = torch.linalg.svd(delta, full_matrices=False)
            root = sigma.sqrt()
            updates[site.path] = LowRank((left * root).float(), (root[:, None] * right).float())
        return Adapter(updates)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is its base again, bit for bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        """Put the kept weights into the model, and keep those that were there."""
        for weight, old in zip(self.parameters, self._kept, strict=True):
            weight.data, old.data = old.data, weight.data

    def close(self) -> None:
        """Put the old weights back."""
        with torch.no_grad():
            for weight, old in zip(self.parameters, self._kept, strict=True):
                weight.requires_grad_(False)
                weight.grad = None
                weight.copy_(old)


def _weight(model: torch.nn.Module, site: Site) -> Tensor:
    module = site_module(model, site.path)
    if weight_dxh(module) is None:
        raise ConfigError(
            f"the weight of {site.path} is stored in a packed form and cannot be trained itself"
        )
    weight: Any = module.weight
    return weight
