"""One training step, and a whole run, against PEFT on padded batches."""

import copy

import pytest
import torch
from torch import nn

from brushstroke.adapter import LoraConfig
from brushstroke.training import Training
from toys import tiny_gpt2, tiny_llama, tiny_olmo
from training_kit import examples, padded_loss, peft_twin, randomise

GRADIENT = 1e-4  # of a gradient tensor's own norm, fp32: the bound; measured 1e-6
CURVE = 1e-3  # of the loss, over 50 steps of AdamW, whose rounding grows from step to step

MODELS = {"llama": tiny_llama, "llama-tied": lambda: tiny_llama(tied=True), "gpt2": tiny_gpt2}
FORMS = {
    "shared": {},
    "unshared": {"share_prefixes": False},
    "micro-1": {"micro_tokens": 1},
    "micro-60": {"micro_tokens": 60},
    "micro-77-unshared": {"micro_tokens": 77, "share_prefixes": False},
    "low-memory": {"memory": "low"},
    "checkpointed": {"gradient_checkpointing": True, "micro_tokens": 64},
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rule", ["standard", "rslora"])
def test_one_step_has_the_gradients_of_peft(model: nn.Module, form: str, rule: str) -> None:
    batch, untouched = examples(), copy.deepcopy(model)
    with Training(model, LoraConfig(rank=4, alpha=7, scale_rule=rule), **FORMS[form]) as run:
        randomise(run.parameters)
        twin, factors = peft_twin(untouched, run.adapter())
        reference = padded_loss(twin, batch)
        reference.backward()
        result = run.forward_backward(batch)
        assert run.packed
        assert result.loss == pytest.approx(reference.item(), rel=1e-5)
        shares = form not in ("unshared", "micro-77-unshared", "micro-1")
        assert (result.computed_tokens < sum(example.reach for example in batch)) == shares
        scale = 1 / result.trained_tokens
        for path, module in run.attachment.modules.items():
            a, b = factors[path]
            for ours, theirs in ((module.lora_U_rows.grad, a.grad), (module.lora_V.grad, b.grad.mT)):
                assert (scale * ours - theirs).norm() <= GRADIENT * theirs.norm(), path


def test_a_model_that_clips_its_projections_in_place_has_the_gradients_of_peft() -> None:
    model, batch = tiny_olmo(clip_qkv=0.5), examples()
    untouched = copy.deepcopy(model)
    with Training(model, LoraConfig(rank=4)) as run:
        randomise(run.parameters)
        twin, factors = peft_twin(untouched, run.adapter())
        padded_loss(twin, batch).backward()
        result = run.forward_backward(batch)
        assert run.packed
        assert not run.step.fusion.counts["attentions"]
        for path, module in run.attachment.modules.items():
            a, b = factors[path]
            for ours, theirs in ((module.lora_U_rows.grad, a.grad), (module.lora_V.grad, b.grad.mT)):
                assert (ours / result.trained_tokens - theirs).norm() <= GRADIENT * theirs.norm(), path


@pytest.mark.slow
@pytest.mark.parametrize("share", [True, False])
def test_fifty_steps_follow_the_same_loss_curve(model: nn.Module, share: bool) -> None:
    batches = [examples(6, seed=step % 5) for step in range(50)]
    curve, untouched = [], copy.deepcopy(model)
    with Training(model, LoraConfig(rank=4), learning_rate=2e-3, share_prefixes=share) as run:
        twin, factors = peft_twin(untouched, run.adapter())
        trained = [p for pair in factors.values() for p in pair]
        optimizer = torch.optim.AdamW(trained, 2e-3, weight_decay=0.0)
        for batch in batches:
            reference = padded_loss(twin, batch)
            optimizer.zero_grad()
            reference.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            ours = run.forward_backward(batch)
            run.optim_step()
            assert ours.loss == pytest.approx(reference.item(), rel=CURVE)
            curve.append(ours.loss)
    assert sum(curve[-5:]) < 0.95 * sum(curve[:5])  # it learns: two flat lines would be equal too
