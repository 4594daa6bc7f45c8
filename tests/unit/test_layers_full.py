"""Training W itself: which weights train, the resulting update, and the base restored bit for bit."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import toys
from brushstroke.adapter import LoraConfig
from brushstroke.base import Base
from brushstroke.errors import AttachError, ConfigError, TargetError, TrainingError
from brushstroke.layers import FullFineTuning, attach, attach_full
from brushstroke.merging import merge
from brushstroke.training import Training
from brushstroke.training.config import default_learning_rate
from training_kit import examples, padded_loss

QV = FullFineTuning(("q_proj", "v_proj"))
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def moved(model: nn.Module, what: FullFineTuning, steps: int = 3) -> Training:
    """A session that has made some steps."""
    session = Training(model, what, learning_rate=1e-2)
    for _ in range(steps):
        session.forward_backward(examples(8))
        session.optim_step()
    return session


@pytest.mark.parametrize(
    ("make", "targets"),
    [(toys.tiny_llama, "all-linear"), (toys.tiny_llama, ("lm_head",)), (toys.tiny_gpt2, ("c_attn", "c_fc"))],
)
def test_training_changes_only_the_sites_and_restores_the_base_bit_for_bit(make, targets) -> None:
    model = make()
    before = toys.snapshot(model)
    session = moved(model, FullFineTuning(targets))
    during = toys.snapshot(model)
    sites = {f"{path}.weight: value" for path in session.attachment.sites}
    other = {name for name in before if during[name] != before[name] and name.endswith(": value")}
    changed = {name for name in other if during[name][3] != before[name][3]}  # type: ignore[index]
    assert changed == sites
    with session.attachment.disabled():
        inside = toys.snapshot(model)
        assert {name for name in sites if inside[name] != before[name]} == set()
    session.close()
    assert toys.snapshot(model) == before


@pytest.mark.parametrize("make", [toys.tiny_llama, toys.tiny_gpt2])
def test_the_gradients_are_those_of_transformers(make) -> None:
    model, rows = make(), examples(9)
    targets = FullFineTuning(("q_proj", "down_proj") if make is toys.tiny_llama else ("c_attn", "c_proj"))
    with attach_full(model, targets) as attachment:
        padded_loss(model, rows).backward()
        expected = {name: weight.grad.clone() for name, weight in attachment.named_parameters()}  # type: ignore[union-attr]
    with Training(model, targets) as run:
        result = run.forward_backward(rows)
        assert run.packed
        assert result.computed_tokens < result.real_tokens  # prefixes are shared
        for name, weight in run.attachment.named_parameters():
            found = weight.grad / result.trained_tokens  # type: ignore[operator]
            assert (found - expected[name]).norm() < 1e-5 * expected[name].norm(), name


@pytest.mark.parametrize(("make", "targets"), [(toys.tiny_llama, QV.targets), (toys.tiny_gpt2, ("c_attn",))])
def test_the_update_is_the_change_of_the_weights(make, targets) -> None:
    model, rows = make(), examples(8)
    session = moved(model, FullFineTuning(targets))
    update, loss = session.adapter(), session.loss(rows).loss
    session.close()
    assert update.card is not None
    assert update.card.fingerprint is not None
    assert float(padded_loss(merge(model, update), rows).detach()) == pytest.approx(loss, rel=1e-5)


def test_a_tied_weight_is_trained_for_its_site_alone() -> None:
    model = toys.tiny_llama(tied=True)
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    before, value = toys.snapshot(model), embedding.detach().clone()
    session = moved(model, FullFineTuning(("lm_head",)))
    assert model.get_input_embeddings().weight is embedding  # type: ignore[operator]
    assert torch.equal(embedding, value)
    assert float(session.adapter()["lm_head"].delta_norm()) > 0
    session.close()
    assert model.get_output_embeddings().weight is embedding  # type: ignore[operator]
    assert toys.snapshot(model) == before


def test_restored_session_continues_to_the_same_bits(tmp_path: Path) -> None:
    with Training(toys.tiny_llama(), QV, learning_rate=1e-2) as whole:
        for step in range(4):
            whole.forward_backward(examples(6, seed=step))
            whole.optim_step()
            if step == 1:
                whole.save(tmp_path / "state")
        expected = [weight.detach().clone() for weight in whole.parameters]
    with Training(toys.tiny_llama(), QV, learning_rate=1e-2).load(tmp_path / "state") as again:
        for step in (2, 3):
            again.forward_backward(examples(6, seed=step))
            again.optim_step()
        assert all(map(torch.equal, expected, again.parameters))


def test_the_rule_of_the_learning_rate_is_a_tenth_of_that_of_factors() -> None:
    with Training(toys.tiny_llama(), QV) as run:
        assert run.learning_rate == pytest.approx(default_learning_rate(32) / 10)


def test_modules_that_run_are_recorded() -> None:
    model = toys.Mlp()
    with attach_full(model, FullFineTuning(("fc1", "fc2"))) as attachment:
        with attachment.recorded() as ran:
            model.fc1(X)
        model.fc2(model.fc1(X))
        assert ran == {model.fc1}
    assert not model.fc1._forward_pre_hooks


def test_a_site_that_ran_and_got_no_gradient_is_an_error_at_that_step() -> None:
    model = toys.tiny_llama()
    mlp = model.get_submodule("model.layers.0.mlp")
    own = mlp.forward
    mlp.forward = lambda x: own(x).detach()  # type: ignore[method-assign, assignment]
    with Training(model, FullFineTuning(("down_proj", "q_proj"))) as run:
        run.forward_backward(examples(4))
        with pytest.raises(TrainingError, match=r"1 of 4 sites ran .*: model.layers.0.mlp.down_proj"):
            run.optim_step()


def test_refusal_of_untrainable_sites_leaves_the_model_unchanged() -> None:
    model = toys.Mlp()
    before = toys.snapshot(model)
    with pytest.raises(TargetError, match="fc3"):
        attach_full(model, FullFineTuning(("fc3",)))
    with attach(model, LoraConfig(rank=2)), pytest.raises(AttachError, match="already has an adapter"):
        attach_full(model, FullFineTuning())
    with attach_full(model, FullFineTuning(("fc1",))) as first:
        with pytest.raises(AttachError, match=r"fc1 is in training already; detach"):
            attach_full(Base(model), FullFineTuning(("fc2", "fc1")))
        first.detach()
        with pytest.raises(AttachError, match="detached already"):
            first.adapter()
    assert toys.snapshot(model) == before
    with pytest.raises(ConfigError, match=r"needs float32, and fc1 is in bfloat16"):
        attach_full(toys.Mlp().bfloat16(), FullFineTuning(("fc1",)))
    computed = toys.Mlp()
    parametrizations.weight_norm(computed.fc2)
    with pytest.raises(ConfigError, match="fc2 is stored in a packed form"):
        attach_full(computed, FullFineTuning(("fc2",)))
