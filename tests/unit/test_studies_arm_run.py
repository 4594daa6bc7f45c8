import pytest
import torch

import training_kit
from brushstroke.base import Base
from brushstroke.errors import ConfigError
from brushstroke.formats import load
from brushstroke.merging import merge
from brushstroke.sites.walk import site_module
from brushstroke.studies.arm_run import ArmRunner, Task, divergence, score, score_rows
from brushstroke.studies.arms import Arm, Run, low_rank, shortened, whole
from brushstroke.studies.controls import principal_inputs
from brushstroke.studies.divergence import SHARES
from brushstroke.studies.random_subspace import SubspaceAdamW, _Gaussian, _Hashed
from brushstroke.training import TrainConfig, Training
from toys import snapshot, tiny_llama

QV = ("q_proj", "v_proj")


@pytest.fixture
def arm_runner(llama, tmp_path) -> ArmRunner:
    rows = training_kit.examples(24)
    task = Task("toy", tuple(rows[:12]), tuple(rows[12:18]), tuple(rows[18:]))
    return ArmRunner(Base(llama), {"task": task}, tuple(rows[:3]), TrainConfig(max_steps=6), tmp_path)


@pytest.mark.parametrize(
    "arm",
    [
        low_rank("q,v", QV, 4),
        whole("q,v", QV, (1e-3,)),
        Arm("few", QV, 4, dimension=5),
        Arm("few of W", QV, None, dimension=5),
    ],
    ids=lambda arm: arm.name,
)
def test_run_scores_and_does_not_change_the_base(arm_runner, arm):
    before = snapshot(arm_runner.base.model)
    outcome = arm_runner.run(Run(arm, 1e-2, 3))
    after = snapshot(arm_runner.base.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if torch.is_tensor(before[name]))
    assert not outcome.diverged
    assert outcome.steps == 6
    assert outcome.test.tokens == sum(example.trained for example in arm_runner.tasks["task"].test)
    assert outcome.general is not None
    assert outcome == workshop_outcome_again(arm_runner, arm, outcome)


def workshop_outcome_again(arm_runner, arm, outcome):
    """A run follows from its arm, rate and seed alone, but for the clock."""
    from dataclasses import replace

    return replace(arm_runner.run(Run(arm, 1e-2, 3)), seconds=outcome.seconds)


@pytest.mark.parametrize(
    "arm", [low_rank("q,v", QV, 4), whole("q,v", QV, (1e-3,))], ids=["low rank", "W itself"]
)
def test_the_divergence_is_that_of_the_merged_model_from_the_base(arm_runner, arm):
    """Against logits of whole models, of the base as it was and with the update in its weights."""
    run = Run(arm, 3e-2, 0)
    model = arm_runner.base.model
    examples = arm_runner.general
    before = _logits(model, examples)
    found = arm_runner.run(run).general.divergence
    merged = merge(model, load(arm_runner.folder / run.key / "adapter"), allow_different_base=True)
    ln_p, ln_q = (logits.double().log_softmax(-1) for logits in (before, _logits(merged, examples)))
    expected = float((ln_p.exp() * (ln_p - ln_q)).sum(-1).mean())
    assert found == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-3


@torch.no_grad()
def _logits(model, examples):
    """Those of all trained tokens."""
    rows = []
    for example in examples:
        logits = model(input_ids=torch.tensor([list(example.tokens)])).logits[0]
        where = [at - 1 for at, weight in enumerate(example.weights) if weight]
        rows.append(logits[where])
    return torch.cat(rows)


@pytest.mark.parametrize("arm", [low_rank("q,v", QV, 4), whole("q,v", QV, (1e-3,))], ids=lambda arm: arm.name)
def test_untrained_model_has_no_divergence(arm_runner, arm):
    before = snapshot(arm_runner.base.model)
    session = arm_runner._open(Run(arm, 1e-3, 0))
    assert divergence(session, arm_runner.general) == 0
    session.close()
    after = snapshot(arm_runner.base.model)
    assert all(torch.equal(before[name], after[name]) for name in before if torch.is_tensor(before[name]))


def test_a_run_takes_every_setting_of_a_step(arm_runner):
    arm_runner.config = TrainConfig(
        share_prefixes=False, gradient_checkpointing=True, clip=0.5, max_length=99
    )
    session = arm_runner._open(Run(low_rank("q,v", QV, 4), 1e-3, 5))
    expected = {"share_prefixes": False, "gradient_checkpointing": True, "clip": 0.5, "max_length": 99}
    expected |= {"learning_rate": 1e-3, "seed": Run(low_rank("q,v", QV, 4), 1e-3, 5).start_seed}
    assert {name: getattr(session.config, name) for name in expected} == expected
    assert not session.share_prefixes
    session.close()


def test_a_shortened_arm_trains_for_its_share_of_the_steps(arm_runner):
    arm = low_rank("q,v", QV, 4)
    assert [arm_runner.run(Run(shortened(arm, share), 1e-2, 0)).steps for share in SHARES] == [2, 3]


def test_a_run_learns_and_keeps_its_update(arm_runner):
    run = Run(low_rank("q,v", QV, 4), 3e-2, 0)
    arm_runner.config = TrainConfig(max_steps=40, batch_size=12)
    before = arm_runner.untouched()["task"]
    outcome = arm_runner.run(run)
    assert outcome.train_loss < before.loss - 0.05
    kept = load(arm_runner.folder / run.key / "adapter")
    assert kept.rank == 4
    assert outcome.start_change > 0


@pytest.mark.parametrize("rows", [[0], [0, 1, 2, 3, 4, 5], [5, 0, 3]])
def test_the_losses_of_single_rows_are_those_of_each_row_alone(arm_runner, rows):
    """Whatever the order in which a forward pass packs them."""
    session = Training(arm_runner.base, low_rank("q,v", QV, 4).lora)
    examples = [arm_runner.tasks["task"].test[row] for row in rows]
    whole, by_row = score_rows(session, examples)
    alone = [score(session, [example]) for example in examples]
    assert by_row == pytest.approx([one.loss * one.tokens for one in alone], rel=1e-5)
    assert sum(by_row) == pytest.approx(whole.loss * whole.tokens, rel=1e-6)
    session.close()


def test_a_run_keeps_the_losses_of_its_test_rows(arm_runner):
    for arm in (low_rank("q,v", QV, 4), whole("q,v", QV, (1e-3,))):
        outcome = arm_runner.run(Run(arm, 1e-3, 0))
        assert len(outcome.test_rows) == 6
        assert sum(outcome.test_rows) == pytest.approx(outcome.test.loss * outcome.test.tokens, rel=1e-6)


def test_diverged_run_is_marked(arm_runner):
    arm_runner.config = TrainConfig(max_steps=6, clip=0.0)
    outcome = arm_runner.run(Run(whole("q,v", QV, (1.0,)), 1e30, 0))
    assert outcome.diverged
    assert outcome.validation is None


def test_an_arm_of_whole_weights_refuses_half_precision(arm_runner):
    arm_runner.base = Base(tiny_llama(dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match=r"needs float32, .* is in bfloat16; .*--no-whole"):
        arm_runner.run(Run(whole("q", ("q_proj",), (1e-3,)), 1e-3, 0))


def test_score_equals_the_loss_of_the_session(llama):
    rows = training_kit.examples(9)
    session = Training(Base(llama), low_rank("q,v", QV, 4).lora)
    found, expected = score(session, rows), session.loss(rows)
    session.close()
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.tokens == expected.trained_tokens
    logits = llama(input_ids=torch.tensor([rows[0].tokens])).logits[0, :-1].argmax(-1)
    right = sum(
        int(logits[i - 1] == token)
        for i, (token, weight) in enumerate(zip(rows[0].tokens, rows[0].weights, strict=True))
        if weight
    )
    session = Training(Base(llama), low_rank("q,v", QV, 4).lora)
    assert score(session, rows[:1]).accuracy == pytest.approx(right / rows[0].trained)
    session.close()


@pytest.mark.parametrize("kind", [_Gaussian, _Hashed])
def test_a_projection_has_unit_columns_and_its_transpose(kind):
    P = kind(200, 7, 3, torch.zeros(1, dtype=torch.float64))
    columns = torch.stack([P.push(e) for e in torch.eye(7, dtype=torch.float64)])
    assert torch.allclose(columns.norm(dim=1), torch.ones(7, dtype=torch.float64))
    g = torch.randn(200, dtype=torch.float64)
    assert torch.allclose(P.pull(g), columns @ g)
    if kind is _Hashed:
        assert torch.allclose(columns @ columns.mT, torch.eye(7, dtype=torch.float64), atol=1e-12)


def test_a_subspace_moves_within_itself():
    x = torch.nn.Parameter(torch.zeros(50))
    optimizer = SubspaceAdamW([x], 3, 0.1, seed=0)
    target = torch.randn(50)
    for _ in range(20):
        optimizer.zero_grad()
        ((x - target) ** 2).sum().backward()
        optimizer.step()
    reached = optimizer._projection.push(optimizer.z)
    assert torch.allclose(x.detach(), reached)


def test_principal_inputs_are_those_of_the_inputs_seen(llama):
    rows = training_kit.examples(6)
    site = "model.layers.0.self_attn.q_proj"
    found = principal_inputs(Base(llama), [site], rows, 4)[site]
    seen = []
    handle = site_module(llama, site).register_forward_pre_hook(lambda m, x: seen.append(x[0].detach()[0]))
    with torch.no_grad():
        for row in rows:
            llama(input_ids=torch.tensor([row.tokens[: row.reach]]))
    handle.remove()
    x = torch.cat(seen).double()
    _, _, right = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    overlap = (right[:4] @ found).square().sum() / 4
    assert float(overlap) == pytest.approx(1.0, abs=1e-5)
    assert not site_module(llama, site)._forward_pre_hooks
