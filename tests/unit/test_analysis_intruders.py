"""Intruders on constructed weights; bounds against dense decompositions; the repair."""

import json

import pytest
import torch

import brushstroke as bs
from brushstroke.analysis import intruders, repair
from brushstroke.errors import BaseLoadError, ConfigError
from brushstroke.lowrank import LowRank

EXACT = 1e-8
FLOAT32 = 2e-3  # of a cosine found by Krylov in float32, whose residual is up to 1e-4·sigma₁
LARGE = {"dense_limit": 0}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def spiked(d: int, h: int) -> torch.Tensor:
    k = min(d, h) // 2
    left, right = (torch.linalg.qr(randn(n, k)).Q for n in (d, h))
    return (left * (20 * torch.arange(1, k + 1).double() ** -0.7)) @ right.mT + randn(d, h) / (d + h) ** 0.5


def found(update: LowRank, W: torch.Tensor, **flags):
    return intruders(bs.Adapter({"q": update}), {"q": W}, **flags)


def dense_cosines(update: LowRank, W: torch.Tensor, top: int) -> torch.Tensor:
    """Algorithm 1 as it is written, on the left vectors of the (out×in) weights."""
    before = torch.linalg.svd(W.double().mT, full_matrices=False).U
    after = torch.linalg.svd((W.double() + update.dense().double()).mT, full_matrices=False).U
    return (after[:, :top].mT @ before).abs().max(dim=1).values


@pytest.mark.parametrize("flags", [{}, LARGE])
def test_zero_update_has_no_intruder(flags):
    W = spiked(60, 50)
    row = found(LowRank(randn(60, 2), torch.zeros(2, 50).double()), W, **flags)["q"]
    assert row.count() == 0
    assert [direction.verdict for direction in row.directions] == ["known"] * 10
    assert row.found is None


def test_one_direction_outside_of_the_weight_is_one_intruder_at_the_top():
    """u ⟂ the output space of W, and c > σ₁."""
    left, right = torch.linalg.qr(randn(30, 13)).Q, torch.linalg.qr(randn(25, 13)).Q
    W = (left[:, :12] * torch.linspace(5, 1, 12).double()) @ right[:, :12].mT
    row = found(LowRank(left[:, 12:], right[:, 12:].mT, 9.0), W)["q"]
    assert row.count() == 1
    assert row.directions[0].verdict == "intruder"
    assert row.directions[0].upper < EXACT
    assert row.directions[0].outside == pytest.approx(1)
    assert all(direction.upper > 0.5 for direction in row.directions[1:])


@pytest.mark.parametrize("flags", [{}, LARGE])
def test_amplified_first_direction_is_not_an_intruder(flags):
    W = spiked(60, 50)
    left, _, right = torch.linalg.svd(W, full_matrices=False)
    row = found(LowRank(left[:, :1], right[:1], 30.0), W, **flags)["q"]
    assert row.count() == row.count("undecided") == 0
    assert row.directions[0].lower == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("d", "h"), [(70, 50), (50, 70)])
def test_intruders_are_output_directions(d, h):
    """A new input direction that writes to W's own first output is nothing new; the reverse is."""
    W = spiked(d, h)
    left, _, right = torch.linalg.svd(W, full_matrices=False)
    new_input = LowRank(torch.linalg.qr(randn(d, 1)).Q, right[:1], 60.0)
    new_output = LowRank(left[:, :1], torch.linalg.qr(randn(h, 1)).Q.mT, 60.0)
    assert found(new_input, W)["q"].count() == 0
    assert found(new_output, W)["q"].count() >= 1


@pytest.mark.parametrize(("d", "h"), [(80, 60), (60, 80), (64, 64)])
def test_the_count_is_that_of_two_dense_decompositions(d, h):
    W, update = spiked(d, h), LowRank(randn(d, 6) / d**0.5, randn(6, h) / h**0.5, 14.0)
    row = found(update, W)["q"]
    expected = dense_cosines(update, W, 10)
    got = torch.tensor([direction.upper for direction in row.directions])
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-4)
    assert row.count() == int((expected < 0.5).sum())
    assert 0 < row.count() < 10
    sigma = torch.linalg.svdvals(W + update.dense())[:10]
    torch.testing.assert_close(
        torch.tensor([direction.sigma for direction in row.directions]).double(), sigma, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(("d", "h"), [(400, 300), (300, 400)])
def test_certificates_of_a_large_weight_are_true(d, h):
    W = spiked(d, h).float()
    update = LowRank(torch.randn(d, 4) / d**0.5, torch.randn(4, h) / h**0.5, 25.0)
    result = found(update, W, **LARGE)
    row, true = result["q"], dense_cosines(update, W, 10).tolist()
    for direction, cosine in zip(row.directions, true, strict=True):
        assert direction.lower <= cosine + FLOAT32
        assert direction.upper >= cosine - FLOAT32
        if direction.verdict == "intruder":
            assert cosine < 0.5
        if direction.verdict == "known":
            assert cosine >= 0.5 - FLOAT32
    assert row.count() >= 3
    assert result.count("undecided") <= 3
    assert json.loads(json.dumps(result.as_dict())) == result.as_dict()


@pytest.mark.parametrize(("d", "h"), [(500, 500), (400, 600)])
def test_a_weak_update_of_a_random_weight_makes_no_intruder(d, h):
    """The strongest directions of a random matrix lie close together, and few steps give mixtures of them."""
    W = randn(d, h).bfloat16()
    update = LowRank(randn(d, 8) / d**0.5, randn(8, h) / h**0.5, 0.5)
    assert bool((dense_cosines(update, W, 10) >= 0.5).all())
    assert found(update, W, **LARGE)["q"].count() == 0


def weight(kind: str, d: int, h: int) -> torch.Tensor:
    k = min(d, h)
    if kind == "spiked":
        return spiked(d, h)
    if kind == "random":
        return randn(d, h) / (d + h) ** 0.5
    if kind == "of small rank and noise":
        return weight("of small rank", d, h) + 0.1 * weight("random", d, h)
    sigma = {
        "of small rank": torch.cat([torch.linspace(5, 1, 12), torch.zeros(k - 12)]),
        "with equal values": torch.cat([torch.full((k // 4,), 3.0), torch.linspace(2, 0.1, k - k // 4)]),
        "of fast decay": 10 ** torch.linspace(1, -7, k),
        "of slow decay": 10 ** torch.linspace(0, -2.5, k),
        "of mild decay": 10 ** torch.linspace(0, -1.65, k),
        "of zeros": torch.zeros(k),
    }[kind].double()
    left, right = (torch.linalg.qr(randn(n, k)).Q for n in (d, h))
    return (left * sigma) @ right.mT


@pytest.mark.parametrize(
    ("d", "h", "dtype"),
    [
        (60, 90, torch.bfloat16),
        (90, 60, torch.float32),
        (120, 80, torch.float64),
        (33, 120, torch.float32),
    ],
)
@pytest.mark.parametrize(
    "kind", ["random", "spiked", "of small rank", "with equal values", "of fast decay", "of zeros"]
)
def test_verdicts_agree_with_the_dense_decomposition(kind, d, h, dtype):
    """Against a dense float64 decomposition, with updates of every alignment and size."""
    W = weight(kind, d, h).to(dtype)
    left, sigma, right = torch.linalg.svd(W.double(), full_matrices=False)
    real = sigma > 1e-14 * float(sigma[0]) if float(sigma[0]) else sigma > 0
    same = (sigma[:, None] - sigma).abs() <= 2e-4 * sigma[0]  # whose mixtures no float32 product tells apart
    size = float(sigma[0]) or 1.0
    new = torch.linalg.qr(randn(h, 5)).Q.mT
    updates = [
        LowRank(torch.linalg.qr(randn(d, 5)).Q, new, 3 * size),
        LowRank(torch.linalg.qr(randn(d, 5)).Q, 0.5 * right[:5] + 0.75**0.5 * new, 3 * size),
        LowRank(left[:, 3:8], right[:5], size),
        LowRank(left, randn(min(d, h), h) / h**0.5, 1e4 * size),
        LowRank(left[:, :5], new, 0.0),
    ]
    for update in updates:
        directions = found(update, W, **LARGE)["q"].directions
        _, sums, outputs = torch.linalg.svd(W.double() + update.dense(), full_matrices=False)
        for direction in directions:
            p = direction.position
            gap = float((torch.cat([sums[:p], sums[p + 1 :]]) - sums[p]).abs().min() / sums[0])
            if gap < 5e-3 or direction.residual > 1e-4:
                continue  # its own neighbours make it a mixture
            cosines = (right @ outputs[p]).abs()
            largest = float(cosines[real].max()) if bool(real.any()) else 0.0
            mixed = float((same[:, real].double() @ cosines[real].square()).max()) ** 0.5
            assert direction.lower <= mixed + FLOAT32
            assert direction.upper >= largest - FLOAT32
            assert direction.verdict != "intruder" or largest < 0.5
            assert direction.verdict != "known" or mixed >= 0.5 - FLOAT32


@pytest.mark.parametrize(("d", "h"), [(160, 160), (180, 120), (120, 180), (100, 250)])
@pytest.mark.parametrize(
    "kind", ["random", "spiked", "of slow decay", "of fast decay", "of small rank and noise"]
)
def test_a_weak_direction_of_the_weight_is_no_intruder_when_the_update_makes_it_strong(kind, d, h):
    """Also where it is weaker than all that was computed of W: then it is undecided, and left as it is."""
    W = weight(kind, d, h)
    left, sigma, right = torch.linalg.svd(W, full_matrices=False)
    k = min(d, h)
    weak, sizes = [k - 1, k - 2, int(0.9 * k), k // 2], torch.linspace(3, 2, 4).double()[:, None]
    mixed = torch.linalg.qr(right[weak].mT + torch.linalg.qr(randn(h, 4)).Q).Q.mT
    inputs = torch.linalg.qr(randn(d, 4)).Q
    for made in (
        LowRank(left[:, weak], right[weak] * sizes, float(sigma[0])),
        LowRank(inputs, mixed * sizes, float(sigma[0])),
    ):
        adapter, base = bs.Adapter({"q": made}), {"q": W.float()}
        result = intruders(adapter, base, top=4, **LARGE)
        assert bool((dense_cosines(made, W.float(), 4) > 0.5).all())
        assert result.count() == 0
        assert repair(adapter, result)["q"] is made


@pytest.mark.parametrize(("kind", "least"), [("random", 0.2), ("of mild decay", 0.02)])
def test_new_directions_are_decided_where_the_weight_has_no_very_weak_ones(kind, least):
    W = weight(kind, 150, 380)
    sigma = torch.linalg.svdvals(W)
    assert least < float(sigma[-1] / sigma[0])
    new = LowRank(torch.linalg.qr(randn(150, 4)).Q, torch.linalg.qr(randn(380, 4)).Q.mT, 3 * float(sigma[0]))
    row = found(new, W.float(), top=4, **LARGE)["q"]
    assert bool((dense_cosines(new, W, 4) < 0.5).all())
    assert row.count() == 4


@pytest.mark.parametrize(("d", "h"), [(150, 100), (100, 150)])
@pytest.mark.parametrize("size", [1e-15, 1e-8, 1e8, 1e15])
def test_verdicts_do_not_depend_on_the_unit(d, h, size):
    W, update = spiked(d, h).float(), LowRank(randn(d, 3) / d**0.5, randn(3, h) / h**0.5, 60.0)
    verdicts = [direction.verdict for direction in found(update, W, **LARGE)["q"].directions]
    scaled = found(size * update, size * W, **LARGE)["q"].directions
    assert [direction.verdict for direction in scaled] == verdicts
    assert verdicts.count("intruder") == 3


def test_a_weight_beyond_the_range_of_the_products_is_refused():
    with pytest.raises(BaseLoadError, match=r"q: the norm of W is \de\+2\d; its square is too large"):
        found(LowRank(randn(9, 1), randn(1, 7)), 1e20 * randn(9, 7).float(), **LARGE)


def test_the_repair_scales_intruders_and_nothing_else():
    W, update = spiked(80, 60), LowRank(randn(80, 3) / 80**0.5, randn(3, 60) / 60**0.5, 30.0)
    adapter = bs.Adapter({"q": update})
    result = intruders(adapter, {"q": W})
    mended = repair(adapter, result, 0.75)["q"]
    left, sigma, right = torch.linalg.svd(W + update.dense(), full_matrices=False)
    picked = [direction.position for direction in result["q"].directions if direction.verdict == "intruder"]
    expected = update.dense() - 0.25 * (left[:, picked] * sigma[picked]) @ right[picked]
    torch.testing.assert_close(mended.dense(), expected, rtol=0, atol=2e-3)
    assert mended.rank == update.rank + len(picked)
    assert len(picked) == 3
    torch.testing.assert_close(repair(adapter, result, 1.0)["q"].dense(), update.dense())


def test_repair_without_intruders_returns_the_adapter():
    W, update = spiked(30, 20), LowRank(randn(30, 1) * 1e-4, randn(1, 20))
    adapter = bs.Adapter({"q": update})
    assert repair(adapter, intruders(adapter, {"q": W}))["q"] is update


def test_invalid_settings_are_refused():
    adapter, W = bs.Adapter({"q": LowRank(randn(4, 1), randn(1, 3))}), {"q": randn(4, 3)}
    top, threshold = (
        "top must be a whole number of at least 1",
        "threshold must be a finite number above 0 and of at most 1",
    )
    wrong = (({"top": 0}, top), ({"threshold": 0.0}, threshold), ({"threshold": 1.1}, threshold))
    for flags, message in wrong:
        with pytest.raises(ConfigError, match=message):
            intruders(adapter, W, **flags)
    with pytest.raises(ConfigError, match="dense_limit must be a whole number of at least 0; got -1"):
        intruders(adapter, W, dense_limit=-1)
    result = intruders(adapter, W)
    with pytest.raises(ConfigError, match="scale"):
        repair(adapter, result, 1.5)
    with pytest.raises(ConfigError, match="another adapter"):
        repair(bs.Adapter({"k": adapter["q"]}), result)


def test_intruder_counts_equal_those_of_peft():
    """PEFT 0.21 has the same algorithm on dense weights."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("peft.tuners.lora.intruders")
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    net = torch.nn.ModuleDict({"q": torch.nn.Linear(40, 32, bias=False)})
    W = spiked(40, 32).float()
    net["q"].weight.data = W.mT.contiguous()
    net.forward = lambda x: net["q"](x)
    model = peft.get_peft_model(net, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q"]))
    layer = model.base_model.model["q"]
    layer.lora_B["default"].weight.data.normal_(std=0.9)
    layer.lora_A["default"].weight.data.normal_(std=0.9)
    update = LowRank(
        layer.lora_A["default"].weight.detach().mT, layer.lora_B["default"].weight.detach().mT, 2.0
    )
    ours = found(update, W)["q"]
    before = layer.get_delta_weight("default").detach()
    torch.testing.assert_close(update.dense().mT, before, rtol=1e-5, atol=1e-5)
    lines: list[str] = []
    reduce_intruder_dimension(model, logging_sink=lines.append)
    assert ours.count() > 0
    assert f"{ours.count()}" in " ".join(lines) or ours.count() == sum("ntruder" in line for line in lines), (
        lines
    )


def test_the_upper_bound_of_a_wide_weight_covers_its_weak_directions():
    left, right = (torch.linalg.qr(randn(n, 64)).Q for n in (64, 200))
    W = (left * 0.9 ** torch.arange(64).double()) @ right.mT
    row = found(LowRank(left[:, -1:], right[:, -1:].mT, 2.0), W.float(), dense_limit=0)["q"]
    cosines = dense_cosines(LowRank(left[:, -1:], right[:, -1:].mT, 2.0), W.float(), 10).tolist()
    for direction, cosine in zip(row.directions, cosines, strict=True):
        assert direction.lower <= cosine + FLOAT32
        assert direction.upper >= cosine - FLOAT32
    assert row.directions[0].verdict == "undecided"


def clustered(d: int, h: int, width: float) -> torch.Tensor:
    """Half of the singular values lie within `width` of one another."""
    k = min(d, h)
    left, right = (torch.linalg.qr(randn(n, k)).Q for n in (d, h))
    sigma = torch.cat([1 + width * torch.linspace(1, 0, k // 2), 0.5 * torch.linspace(1, 0.1, k - k // 2)])
    return ((left * sigma.double()) @ right.mT).float()


@pytest.mark.parametrize("width", [1e-6, 4e-5, 2e-4])
@pytest.mark.parametrize("size", [1e-7, 1e-3])
@pytest.mark.parametrize("flags", [{}, LARGE])
@pytest.mark.parametrize(("d", "h"), [(60, 150), (150, 60), (90, 90)])
def test_verdicts_with_close_singular_values_are_true(d, h, width, size, flags):
    W, update = clustered(d, h, width), LowRank(randn(d, 3) / d**0.5, randn(3, h) / h**0.5, size)
    row = found(update, W, **flags)["q"]
    for direction, cosine in zip(row.directions, dense_cosines(update, W, 10).tolist(), strict=True):
        assert direction.verdict != ("known" if cosine < 0.5 else "intruder")
        assert direction.lower <= cosine + FLOAT32
        assert direction.upper >= cosine - FLOAT32
    if not flags:
        assert row.count("undecided") == 0


@pytest.mark.parametrize("size", [100, 1000, 1e5])
@pytest.mark.parametrize("flags", [{}, LARGE])
def test_verdicts_of_an_update_much_larger_than_the_weight_are_true(size, flags):
    W, update = randn(80, 120).float(), LowRank(randn(80, 4), randn(4, 120), float(size))
    row = found(update, W, **flags)["q"]
    for direction, cosine in zip(row.directions, dense_cosines(update, W, 10).tolist(), strict=True):
        assert direction.verdict != ("known" if cosine < 0.5 else "intruder")
    if not flags:
        assert row.count("undecided") == 0


@pytest.mark.parametrize("flags", [{}, LARGE])
def test_a_weight_of_equal_singular_values_has_no_false_intruders(flags):
    orthogonal = torch.linalg.qr(torch.randn(70, 70)).Q
    for W in (torch.eye(70), orthogonal, torch.zeros(70, 70)):
        still = found(LowRank(torch.randn(70, 2), torch.zeros(2, 70)), W, **flags)["q"]
        assert still.count() == still.count("undecided") == 0
    small = LowRank(torch.randn(70, 2), torch.randn(2, 70), 1e-8)
    assert found(small, torch.eye(70), **flags)["q"].count() == 0
    assert found(small, torch.zeros(70, 70), **flags)["q"].count() == 2
