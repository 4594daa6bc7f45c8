"""Initial factors: their distribution and their seed."""

import pytest
import torch

from brushstroke.lowrank.init import INITS, gaussian, kaiming


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", INITS)
def test_a_seed_fixes_the_start(name):
    one, two, other = (INITS[name](30, 4, seeded(s)) for s in (0, 0, 1))
    assert one.shape == (4, 30)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_global_random_state_is_unchanged():
    before = torch.random.get_rng_state()
    for init in INITS.values():
        init(30, 4, seeded())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_kaiming_is_that_of_torch_and_loralib():
    """nn.init.kaiming_uniform_(a=√5) of a (r, d) matrix is uniform in ±1/√d."""
    U_rows = kaiming(400, 50, seeded())
    bound = 400**-0.5
    assert U_rows.abs().max() <= bound
    assert U_rows.abs().max() > 0.99 * bound
    assert U_rows.var().item() == pytest.approx(bound**2 / 3, rel=0.03)
    assert U_rows.mean().abs() < 3 * bound / (3 * U_rows.numel()) ** 0.5
    torch.manual_seed(0)
    reference = torch.nn.init.kaiming_uniform_(torch.empty(50, 400), a=5**0.5)
    assert reference.abs().max() <= bound * (1 + 1e-6)


def test_gaussian_has_variance_one_over_d():
    assert gaussian(400, 50, seeded()).var().item() == pytest.approx(1 / 400, rel=0.04)
