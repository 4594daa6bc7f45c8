"""A kind of layer and a type of update that brushstroke does not have, added by one line in each table."""

import copy
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import brushstroke as bs
from brushstroke.adapter import Adapter, LoraConfig
from brushstroke.cli.app import main
from brushstroke.errors import AdapterFileError, AttachError, MergeError, ShapeError
from brushstroke.formats.peft_config import write_config
from brushstroke.formats.peft_forms import FORMS, Form
from brushstroke.layers import attach, bank
from brushstroke.layers.adapted import Attached, Trial
from brushstroke.layers.fresh import Start, fresh_lora
from brushstroke.layers.linear import AttachedLinear, BankedLinear, Factors, _LowRankLayer
from brushstroke.layers.registry import VARIANTS, Variant
from brushstroke.lowrank import LowRank, Update
from brushstroke.merging import merge
from brushstroke.merging.in_memory import merge_weight
from brushstroke.sites import KINDS, Kind, check_base
from toys import tiny_llama
from training_kit import examples

EXACT = 1e-5  # relative, float32


@contextmanager
def registered(variant: Variant, form: Form | None = None, kind: Kind | None = None) -> Iterator[None]:
    """Context manager: the tables have these entries too."""
    before = dict(KINDS), list(VARIANTS), list(FORMS)
    VARIANTS.append(variant)
    FORMS.extend([form] if form else [])
    KINDS.update({kind.name: kind} if kind else {})
    try:
        yield
    finally:
        KINDS.clear()
        KINDS.update(before[0])
        VARIANTS[:], FORMS[:] = before[1], before[2]


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


# A kind of layer: convolutions with a kernel of one pixel, which PEFT stores with four axes.


def convolve(module: Any, x: Tensor, W: Tensor) -> Tensor:
    return F.conv2d(x, W.mT[:, :, None, None], stride=module.stride)


POINTWISE = Kind(
    name="pointwise",
    matches=lambda module: isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1),
    shape=lambda module: (module.in_channels, module.out_channels),
    to_dxh=lambda weight: weight.flatten(1).mT,
    from_dxh=lambda W, shape: W.mT.reshape(shape),
    is_plain=lambda cls: cls.forward is nn.Conv2d.forward,
    example=lambda module, rows, generator: torch.randn(rows, module.in_channels, 3, 3, generator=generator),
    product=convolve,
    in_groups=False,
    refusal=lambda module: "it has groups" if module.groups > 1 else None,
)


class PointwiseLowRank(LowRank):
    """scale·U·V; in files its factors have four axes."""


def fresh_pointwise(start: Start) -> PointwiseLowRank:
    zero = fresh_lora(start)
    return PointwiseLowRank(zero.U, zero.V, zero.scale)


class _Pointwise(_LowRankLayer):
    def leading(self, x: Tensor) -> torch.Size:
        return x.shape[:1]

    def plain_term(self, x: Tensor, U: Tensor, V: Tensor) -> Tensor:
        return F.conv2d(self._kind.product(self, x, U), V.mT[:, :, None, None])

    def term(self, x: Tensor, factors: Factors, dropout: float = 0.0) -> Tensor:
        U_rows, V, scale = factors
        return self.plain_term(F.dropout(x, dropout), U_rows.mT, scale * V)

    def parts(self, x: Tensor) -> None:
        self._route.record(self)


class AttachedPointwise(_Pointwise, AttachedLinear):
    def update(self) -> PointwiseLowRank:
        return PointwiseLowRank(*super().update().factors)


class BankedPointwise(_Pointwise, BankedLinear):
    def may_stack(self, x: Tensor) -> bool:
        return False


CONVOLUTIONS = (
    Variant(
        "lora", PointwiseLowRank, ("pointwise",), AttachedPointwise, BankedPointwise, fresh=fresh_pointwise
    ),
    Form(PointwiseLowRank, {"U": ("lora_A.weight", "r d 1 1"), "V": ("lora_B.weight", "h r 1 1")}),
    POINTWISE,
)


class Pixels(nn.Module):
    """A convolution of one pixel, one of nine, one of one again, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide = nn.Conv2d(3, 8, 1, stride=2), nn.Conv2d(8, 8, 3, padding=1)
        self.last, self.head = nn.Conv2d(8, 6, 1, bias=False), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(torch.tanh(self.wide(torch.tanh(self.first(x)))))
        return self.head(x.mean((2, 3)))


PIXELS = LoraConfig(rank=2, alpha=4, targets=["first", "last", "head"])


def train(parameters: Iterator[nn.Parameter], net: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.AdamW(parameters, 1e-2)
    for _ in range(5):
        loss = (net(x) - 1.0).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_kind_of_layer_is_trained_merged_and_saved(tmp_path: Path) -> None:
    net, x = Pixels(), torch.randn(5, 3, 8, 8)
    base = net(x)
    with registered(*CONVOLUTIONS):
        with attach(net, PIXELS, trainable=True) as attachment:
            assert torch.equal(net(x), base)
            train(attachment.parameters(), net, x)
            adapter, expected = attachment.adapter(), net(x).detach()
        assert relative(expected, base) > 0.01
        assert relative(merge(net, adapter)(x), expected) < EXACT
        again = bs.load(bs.save(adapter, tmp_path / "ours"))
        assert all(torch.equal(again[site].dense(), update.dense()) for site, update in adapter.items())
        with attach(net, again):
            assert relative(net(x), expected) < EXACT
        with bank(net, {"a": again}) as held, held.rows(["a", None, "a", "a", None]):
            mixed = net(x)
        chosen = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])[:, None]
        assert relative(mixed, torch.where(chosen > 0, expected, base)) < EXACT
    assert torch.equal(net(x), base)


def test_a_kind_of_layer_runs_in_half_precision() -> None:
    net, x = Pixels().bfloat16(), torch.randn(5, 3, 8, 8, dtype=torch.bfloat16)
    adapter = Adapter({"first": PointwiseLowRank(torch.randn(3, 2), torch.randn(2, 8))}).to(torch.bfloat16)
    with registered(*CONVOLUTIONS):
        expected = merge(net.float(), adapter)(x.float())
        net.bfloat16()
        with attach(net, adapter):
            assert relative(net(x), expected) < 0.03
        with bank(net, {"a": adapter}) as held, held.rows(["a", None, "a", "a", None]):
            assert relative(net(x)[0], expected[0]) < 0.03


def test_a_kind_of_layer_is_stored_and_trained_as_by_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    net, x = Pixels(), torch.randn(5, 3, 8, 8)
    with registered(*CONVOLUTIONS):
        with attach(net, PIXELS) as attachment:
            bs.save(attachment.adapter(), tmp_path / "ours")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / "ours"), is_trainable=True)
        train((p for p in theirs.parameters() if p.requires_grad), theirs, x)
        with attach(net, bs.load(tmp_path / "ours"), trainable=True) as attachment:
            train(attachment.parameters(), net, x)
            assert relative(net(x), theirs(x)) < EXACT
        theirs.save_pretrained(tmp_path / "theirs")
        with attach(net, bs.load(tmp_path / "theirs")):
            assert relative(net(x), theirs(x)) < EXACT


def test_factors_with_other_axes_are_refused_with_both_shapes(tmp_path: Path) -> None:
    with registered(*CONVOLUTIONS):
        bs.save(Adapter({"first": PointwiseLowRank(torch.ones(3, 2), torch.ones(2, 8))}), tmp_path / "a")
        config = tmp_path / "a" / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "r": 5}))
        with pytest.raises(AdapterFileError, match=r"lora_A \(2, 3, 1, 1\) should be \(5, d, 1, 1\)"):
            bs.load(tmp_path / "a")
        FORMS[:] = [form for form in FORMS if max(map(len, form.axes.values())) <= 2]
        with pytest.raises(AdapterFileError, match=r"lora_A.weight: expected floats with 2 axes; found"):
            bs.load(tmp_path / "a")


def test_a_module_that_its_kind_refuses_is_named_with_the_reason() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))
    with (
        registered(*CONVOLUTIONS),
        pytest.raises(bs.errors.TargetError, match="0 cannot be adapted: it has gr"),
    ):
        attach(net, LoraConfig(rank=1, targets=["0"]))


# Another kind of layer: it stores W as d×h, as Hugging Face's Conv1D does.


class Product(nn.Module):
    """y = x·W + bias."""

    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(d, h) / d**0.5), nn.Parameter(torch.randn(h))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


PRODUCT = Kind(
    name="product",
    matches=lambda module: isinstance(module, Product),
    shape=lambda module: tuple(module.weight.shape),
    to_dxh=lambda weight: weight,
    from_dxh=lambda W, shape: W,
    is_plain=lambda cls: cls.forward is Product.forward,
    example=lambda module, rows, generator: torch.randn(rows, module.weight.shape[0], generator=generator),
)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, EXACT), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize(("d", "h"), [(8, 8), (6, 10)])
def test_a_kind_may_store_its_weight_as_dxh(
    d: int, h: int, dtype: torch.dtype, bound: float, frozen: bool
) -> None:
    net = nn.Sequential(Product(d, h), nn.Tanh(), Product(h, d)).to(dtype).requires_grad_(not frozen)
    x = torch.randn(3, 5, d, dtype=dtype)
    adapter = Adapter({"0": lowrank(d, h), "2": lowrank(h, d)})
    with registered(Variant("lora", LowRank, ("product",), AttachedLinear, BankedLinear), kind=PRODUCT):
        expected = merge(net.float(), adapter)(x.float())
        net.to(dtype)
        with attach(net, adapter):
            assert relative(net(x), expected) < bound
        with bank(net, {"a": adapter}) as held, held.rows(["a", None, "a"]):
            mixed = net(x)
    assert relative(mixed[::2], expected[::2]) < bound
    assert relative(mixed[1], net(x)[1]) < bound


def lowrank(d: int, h: int) -> LowRank:
    return LowRank(torch.randn(d, 2), torch.randn(2, h), 0.5)


# A type of update: VeRA-like, with other names than U and V, no rank, and a tensor named scale.


@dataclass(frozen=True, eq=False)
class Scaled(Update):
    """ΔW = A1·B1·diag(scale)."""

    A1: Tensor
    B1: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.A1.shape[0], self.B1.shape[1]

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors().values())

    @property
    def dtype(self) -> torch.dtype:
        return self.A1.dtype

    def tensors(self) -> dict[str, Tensor]:
        return {"A1": self.A1, "B1": self.B1, "scale": self.scale}

    def dense(self, W: Tensor | None = None) -> Tensor:
        return self.A1 @ self.B1 * self.scale

    def entries(self, i: Tensor, j: Tensor, W: Tensor | None = None) -> Tensor:
        return self.dense().double().cpu()[i, j]

    def columns(self, start: int, stop: int) -> "Scaled":
        return Scaled(self.A1, self.B1[:, start:stop], self.scale[start:stop])

    def delta_norm(self) -> float:
        return float(self.dense().double().norm())

    def apply(self, x: Tensor) -> Tensor:
        return x @ self.A1 @ self.B1 * self.scale

    def inner(self, other: Update) -> float:
        return float((self.dense() * other.dense()).double().sum())

    def truncate(self, rank: int) -> "Scaled":
        raise NotImplementedError

    def __add__(self, other: Update) -> "Scaled":
        raise NotImplementedError

    def __mul__(self, factor: float) -> "Scaled":
        return Scaled(self.A1, self.B1, factor * self.scale)


class AttachedScaled(Attached):
    tensor_A1: nn.Parameter
    tensor_B1: nn.Parameter
    tensor_scale: nn.Parameter
    _added = ("tensor_A1", "tensor_B1", "tensor_scale", "dropout")

    def install(self, update: Scaled, *, trainable: bool, dropout: float) -> None:
        self.dropout = dropout
        for name, tensor in update.tensors().items():
            held = nn.Parameter(tensor.detach().clone(), requires_grad=trainable)
            self.register_parameter(f"tensor_{name}", held)

    def factors(self) -> Mapping[str, nn.Parameter]:
        names = ("tensor_A1", "tensor_B1", "tensor_scale")
        return {name: getattr(self, name) for name in names}

    def update(self) -> Scaled:
        return Scaled(*(factor.detach().clone() for factor in self.factors().values()))

    def forward(self, x: Tensor) -> Tensor:
        self._route.record(self)
        y = super().forward(x)
        return y if self._route.uniform == 0 else y + Scaled(*self.factors().values()).apply(x)

    def trial(self, x: Tensor, base: Tensor, generator: torch.Generator) -> Trial:
        d, h = self.widths
        tensors = (torch.randn(shape, generator=generator) for shape in ((d, 1), (1, h), (h,)))
        update = Scaled(*tensors)
        held = {f"tensor_{name}": tensor for name, tensor in update.tensors().items()}
        return Trial(held, {}, base.double() + update.to(torch.float64).apply(x.double()))


def fresh_scaled(start: Start) -> Scaled:
    A1 = torch.randn(start.site.d, start.rank, generator=start.generator)
    B1 = torch.randn(start.rank, start.site.h, generator=start.generator)
    return Scaled(A1, B1, torch.zeros(start.site.h))


SCALED = Variant("scaled", Scaled, ("linear",), AttachedScaled, fresh=fresh_scaled)
SCALED_FORM = Form(
    Scaled,
    {"A1": ("lora_A1.weight", "r d"), "B1": ("lora_B1.weight", "h r"), "scale": ("other_scale", "h")},
)
LORA = LoraConfig(rank=3, targets=["attention"], variant="scaled")
SETTINGS = bs.TrainConfig(epochs=2, batch_size=4, learning_rate=1e-2, checkpoint_every=2)


def test_an_update_is_trained_saved_shown_and_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokens = tiny_llama(), torch.randint(3, 64, (2, 9))
    base = model(input_ids=tokens).logits
    with registered(SCALED, SCALED_FORM):
        result = bs.train(bs.Base(model, None, "tiny"), examples(10), LORA, SETTINGS, out=tmp_path / "run")
        assert (
            result.summary["final_loss"]
            < json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        )
        again = bs.load(tmp_path / "run")
        for site, update in result.adapter.items():
            assert type(again[site]) is Scaled
            for name, tensor in update.tensors().items():
                assert torch.equal(again[site].tensors()[name], tensor)
        assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["r"] == 3
        with attach(model, again):
            expected = model(input_ids=tokens).logits
        assert relative(expected, base) > 1e-3
        assert relative(merge(model, again)(input_ids=tokens).logits, expected) < EXACT
        model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
        report = bs.merge_folder(tmp_path / "base", again, tmp_path / "merged", verify=True)
        assert report.logit_drift is not None
        assert report.logit_drift < EXACT
        assert main(["show", str(tmp_path / "run"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["norm"] == pytest.approx(again.norm())
        assert main(["show", str(tmp_path / "run")]) == 0
        with pytest.raises(AttachError, match=r"has a Scaled at .* which a bank cannot hold"):
            bank(model, {"a": again})


@dataclass(frozen=True, eq=False)
class Hadamard(Scaled):
    """ΔW = scale·(A1·B1)∘(A2·B2), which PEFT calls LoHa."""

    scale: float  # type: ignore[assignment]
    A2: Tensor
    B2: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"A1": self.A1, "B1": self.B1, "A2": self.A2, "B2": self.B2}

    def dense(self, W: Tensor | None = None) -> Tensor:
        return self.scale * (self.A1 @ self.B1) * (self.A2 @ self.B2)


def hadamard(d: int, h: int) -> Hadamard:
    A1, B1, A2, B2 = (torch.randn(shape) for shape in ((d, 2), (2, h)) * 2)
    return Hadamard(A1, B1, 1.5, A2, B2)


LOHA = Form(
    Hadamard,
    {
        "A1": ("hada_w1_b", "r d"),
        "B1": ("hada_w1_a", "h r"),
        "A2": ("hada_w2_b", "r d"),
        "B2": ("hada_w2_a", "h r"),
    },
    peft_type="LOHA",
    fields={"alpha": "lora_alpha", "init_weights": "init_lora_weights"},
)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_an_update_of_another_type_of_peft_is_exchanged_with_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    net, x = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), torch.randn(6, 5)
    pair = [hadamard(5, 4), hadamard(4, 3)]
    adapter = Adapter(dict(zip("01", pair, strict=True)), bs.Card(lora={"scale_rule": "rslora"}))
    with registered(SCALED, LOHA):
        again = bs.load(bs.save(adapter, tmp_path / "ours"))
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / "ours"), is_trainable=True)
        expected = x
        for layer, update in zip(net, pair, strict=True):
            expected = layer(expected) + expected @ update.dense()
        assert relative(theirs.eval()(x), expected) < EXACT
        train((p for p in theirs.parameters() if p.requires_grad), theirs, x)
        theirs.save_pretrained(tmp_path / "theirs")
        trained = bs.load(tmp_path / "theirs")
        for site, update in adapter.items():
            assert torch.equal(again[site].dense(), update.dense())
            ours = getattr(theirs.base_model.model, site).get_delta_weight("default").mT
            assert relative(trained[site].dense(), ours) < EXACT
        config = tmp_path / "ours" / "adapter_config.json"
        text = config.read_text()
        config.write_text(text.replace("LOHA", "LORA"))
        with pytest.raises(AdapterFileError, match="lora_alpha is not there"):
            bs.load(tmp_path / "ours")
        for theirs_name, name in LOHA.fields.items():
            text = text.replace(f'"{theirs_name}"', f'"{name}"')
        config.write_text(text.replace("LOHA", "LORA"))
        with pytest.raises(AdapterFileError, match=r"0: has base_model.*hada_w1_a.* but no .* lora_A"):
            bs.load(tmp_path / "ours")
        config.write_text(text.replace("LOHA", "LOKR"))
        with pytest.raises(AdapterFileError, match="peft_type is 'LOKR'; expected 'LORA' or 'LOHA'"):
            bs.load(tmp_path / "ours")
        mixed = Adapter({"0": pair[0], "1": LowRank(torch.ones(4, 1), torch.ones(1, 3))})
        with pytest.raises(AdapterFileError, match="it mixes Hadamard, LowRank, and PEFT's config has one"):
            bs.save(mixed, tmp_path / "mixed")


@dataclass(frozen=True, eq=False)
class Kronecker(Scaled):
    """ΔW = scale·(A1 ⊗ B1), which PEFT calls LOKR; it has a scale, but no axis r."""

    scale: float  # type: ignore[assignment]

    @property
    def shape(self) -> tuple[int, int]:
        return self.A1.shape[0] * self.B1.shape[0], self.A1.shape[1] * self.B1.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        return {"A1": self.A1, "B1": self.B1}

    def dense(self, W: Tensor | None = None) -> Tensor:
        return self.scale * torch.kron(self.A1, self.B1)


KRONECKER = {"A1": ("lokr_w1", "m l"), "B1": ("lokr_w2", "k n")}


@pytest.mark.parametrize(
    "form", [Form(Kronecker, KRONECKER, peft_type="OWN"), Form(Kronecker, KRONECKER, "own")]
)
@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_a_scale_is_saved_without_an_axis_r(tmp_path: Path, form: Form, scale: float) -> None:
    with registered(SCALED, form):
        saved = bs.save(Adapter({"0": Kronecker(torch.ones(2, 3), torch.ones(4, 4), scale)}), tmp_path / "a")
        (update,) = bs.load(saved).values()
    assert isinstance(update, Kronecker)
    assert update.scale == scale


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_an_update_with_a_scale_and_no_axis_r_is_exchanged_with_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    net, x = nn.Sequential(nn.Linear(8, 12)), torch.randn(6, 8)
    form = Form(
        Kronecker,
        KRONECKER,
        peft_type="LOKR",
        fields={"alpha": "lora_alpha", "init_weights": "init_lora_weights"},
        constants={"r": 64, "decompose_factor": -1},
    )
    with registered(SCALED, form):
        settings = peft.LoKrConfig(r=64, alpha=16, target_modules=["0"])
        theirs = peft.get_peft_model(copy.deepcopy(net), settings)
        train((p for p in theirs.parameters() if p.requires_grad), theirs, x)
        theirs.save_pretrained(tmp_path / "theirs")
        adapter = bs.load(tmp_path / "theirs")
        expected = net(x) + x @ adapter["0"].dense()
        assert relative(theirs.eval()(x), expected) < EXACT
        bs.save(adapter, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / "ours"))
    assert relative(again.eval()(x), expected) < EXACT


@dataclass(frozen=True, eq=False)
class Gains(Update):
    """ΔW = W·diag(gains − 1), which PEFT calls IA3; it has no rank, and fits any input width."""

    gains: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return -1, len(self.gains)

    @property
    def parameters(self) -> int:
        return self.gains.numel()

    @property
    def dtype(self) -> torch.dtype:
        return self.gains.dtype

    def tensors(self) -> dict[str, Tensor]:
        return {"gains": self.gains}

    def dense(self, W: Tensor | None = None) -> Tensor:
        return self._needed(W) * (self.gains - 1)

    def entries(self, i: Tensor, j: Tensor, W: Tensor | None = None) -> Tensor:
        return self.dense(W).double()[i, j]

    def columns(self, start: int, stop: int) -> "Gains":
        return Gains(self.gains[start:stop])

    def _needed(self, W: Tensor | None = None, *_: object) -> Any:
        if W is None:
            raise ShapeError("depends on W")
        return W

    delta_norm = apply = inner = truncate = __add__ = __mul__ = lambda self, *_: self._needed()


IA3 = Form(
    Gains,
    {"gains": ("ia3_l", "h 1")},
    peft_type="IA3",
    fields={"init_ia3_weights": "init_lora_weights"},
    constants={"feedforward_modules": []},
)


def test_an_update_without_a_rank_is_exchanged_with_peft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    net, x = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), torch.randn(6, 5)
    settings = peft.IA3Config(target_modules=["0", "1"], feedforward_modules=[])
    with registered(SCALED, IA3):
        wrapped = peft.get_peft_model(copy.deepcopy(net), settings)
        train((p for p in wrapped.parameters() if p.requires_grad), wrapped, x)
        wrapped.save_pretrained(tmp_path / "theirs")
        adapter = bs.load(tmp_path / "theirs")
        check_base(net, adapter)
        expected = x
        for layer, update in zip(net, adapter.values(), strict=True):
            expected = (
                expected @ (layer.weight.mT + update.dense(layer.weight.mT)) + layer.bias * update.gains
            )
        assert relative(wrapped.eval()(x), expected) < EXACT
        bs.save(adapter, tmp_path / "ours")
        config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
        assert config["feedforward_modules"] == []
        assert not config.keys() & {"r", "lora_alpha", "rank_pattern", "use_dora"}
        again = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / "ours"))
        assert relative(again.eval()(x), expected) < EXACT
        assert main(["show", str(tmp_path / "ours")]) == 0
        assert "any×4" in capsys.readouterr().out


class InputGains(Gains):
    """ΔW = diag(gains − 1)·W; PEFT's file has one row, and its config lists the sites."""

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.gains), -1

    def columns(self, start: int, stop: int) -> "InputGains":
        return self

    def dense(self, W: Tensor | None = None) -> Tensor:
        return self._needed(W) * (self.gains - 1)[:, None]


IA3_OF_INPUTS = Form(
    InputGains, {"gains": ("ia3_l", "1 d")}, peft_type="IA3", lists_sites="feedforward_modules"
)


def test_two_forms_with_the_same_key_are_exchanged_with_peft(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    net, x = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), torch.randn(6, 5)
    settings = peft.IA3Config(target_modules=["0", "1"], feedforward_modules=["1"])
    with registered(SCALED, IA3), registered(SCALED, IA3_OF_INPUTS):
        wrapped = peft.get_peft_model(copy.deepcopy(net), settings)
        train((p for p in wrapped.parameters() if p.requires_grad), wrapped, x)
        wrapped.save_pretrained(tmp_path / "theirs")
        adapter = bs.load(tmp_path / "theirs")
        assert [type(update) for update in adapter.values()] == [Gains, InputGains]
        expected = net[1](net[0](x) * adapter["0"].gains * adapter["1"].gains)  # type: ignore[attr-defined]
        assert relative(wrapped.eval()(x), expected) < EXACT
        assert relative(merged_with(net, adapter)(x), expected) < EXACT
        card = (bs.save(adapter, tmp_path / "ours") / "README.md").read_text()
        assert main(["show", str(tmp_path / "ours")]) == 0
        added = Adapter({"0": LowRank(torch.ones(5, 1), torch.ones(1, 4))}) + Adapter({"1": adapter["1"]})
        assert added.keys() == {"0", "1"}
        with pytest.raises(ShapeError, match="depends on W"):
            added + adapter
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["feedforward_modules"] == ["1"]
    again = peft.PeftModel.from_pretrained(copy.deepcopy(net), str(tmp_path / "ours"))
    assert relative(again.eval()(x), expected) < EXACT
    assert "With PEFT, if it knows the type IA3: `PeftModel" in card
    for text in (card, capsys.readouterr().out):
        assert not re.search(r"rank [0-9]|alpha", text)


def merged_with(net: nn.Sequential, adapter: Adapter) -> nn.Sequential:
    """The layers of a net with merged weights, with gains of outputs also for the bias."""
    merged = copy.deepcopy(net)
    for name, update in adapter.items():
        layer = merged.get_submodule(name)
        W, _ = merge_weight(layer.weight.detach().mT, update, name)  # type: ignore[union-attr, operator]
        layer.weight.data = W.mT  # type: ignore[union-attr]
        if type(update) is Gains:
            layer.bias.data *= update.gains  # type: ignore[union-attr]
    return merged


class InheritedColumns(InputGains):
    columns = Gains.columns


class InheritedTo(InputGains):
    def to(self, dtype: Any = None, device: Any = None) -> Any:
        return Gains(self.gains.to(device, dtype))


@pytest.mark.parametrize(("cls", "d", "h"), [(InheritedColumns, 4, 3), (InheritedTo, 4, 4)])
def test_a_merge_refuses_an_update_whose_inherited_methods_return_another_type(
    cls: type[InputGains], d: int, h: int
) -> None:
    with pytest.raises(MergeError, match=rf"fc: `to` or `columns` of {cls.__name__} returned a Gains"):
        merge_weight(torch.ones(d, h), cls(torch.full((d,), 2.0)), "fc")


class OwnLowRank(LowRank):
    """A type of update that derives from another one."""


def test_the_type_of_an_update_is_kept() -> None:
    update = OwnLowRank(torch.ones(3, 1), torch.ones(1, 4))
    assert {type(made) for made in (update.to(torch.float64), update.columns(1, 3))} == {OwnLowRank}
    moved = hadamard(3, 4).to(torch.float64)
    assert (type(moved), moved.A2.dtype, moved.scale) == (Hadamard, torch.float64, 1.5)


def saved_config(folder: Path, adapter: Adapter, **changes: Any) -> dict[str, Any]:
    """The config of a saved adapter, in which some fields are changed."""
    file = bs.save(adapter, folder, overwrite=True) / "adapter_config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps(config))
    return config


def test_a_flag_of_a_type_without_a_rank_is_written(tmp_path: Path) -> None:
    form = dataclasses.replace(IA3, flag="of_outputs", peft_type="OWN")
    with registered(SCALED, form):
        config = saved_config(tmp_path, Adapter({"0": Gains(torch.full((4,), 2.0))}))
        assert config["of_outputs"] is True
        assert isinstance(bs.load(tmp_path)["0"], Gains)


def test_a_config_of_another_type_has_no_fields_of_lora_alone(tmp_path: Path) -> None:
    with registered(SCALED, LOHA):
        config = saved_config(tmp_path, Adapter({"0": hadamard(5, 4)}))
    assert not config.keys() & {"use_dora", "use_rslora", "lora_dropout", "bias", "init_lora_weights"}
    assert config.keys() >= {"r", "alpha", "rank_pattern", "init_weights"}


def test_only_files_with_sites_of_a_form_of_lora_list_them(tmp_path: Path) -> None:
    form = Form(Gains, {"gains": ("own_gains", "h")}, lists_sites="own_sites")
    plain = Adapter({"0": LowRank(torch.ones(5, 1), torch.ones(1, 4))})
    with registered(SCALED, form):
        assert "own_sites" not in saved_config(tmp_path, plain)
        mixed = Adapter({**plain, "1": Gains(torch.ones(3))})
        assert saved_config(tmp_path, mixed)["own_sites"] == ["1"]
        assert {site: type(update) for site, update in bs.load(tmp_path).items()} == {
            "0": LowRank,
            "1": Gains,
        }


@pytest.mark.parametrize(
    ("listed", "reason"),
    [
        (["0", "1"], r"0: ia3_l \(4, 1\) should be \(1, d\), .* and feedforward_modules lists it"),
        ([], r"1: ia3_l \(1, 4\) should be \(h, 1\), .* and feedforward_modules does not list it"),
        (5, "feedforward_modules is 5; expected a text or a list of texts"),
        ("(", r"'\(' in a pattern is no regular expression"),
    ],
)
def test_a_list_of_sites_that_contradicts_their_shapes_is_refused(
    tmp_path: Path, listed: object, reason: str
) -> None:
    with registered(SCALED, IA3), registered(SCALED, IA3_OF_INPUTS):
        adapter = Adapter({"0": Gains(torch.ones(4)), "1": InputGains(torch.ones(4))})
        saved_config(tmp_path, adapter, feedforward_modules=listed)
        with pytest.raises(AdapterFileError, match=reason):
            bs.load(tmp_path)
        saved_config(tmp_path, adapter, feedforward_modules="1")  # a regular expression
        assert [type(update) for update in bs.load(tmp_path).values()] == [Gains, InputGains]


def test_a_site_is_refused_if_no_form_may_have_it(tmp_path: Path) -> None:
    with registered(SCALED, IA3_OF_INPUTS):
        saved_config(tmp_path, Adapter({"1": InputGains(torch.ones(4))}), feedforward_modules=[])
        with pytest.raises(AdapterFileError, match=r"1: has .* but in .* feedforward_modules does not"):
            bs.load(tmp_path)


@pytest.mark.parametrize("cls", [Gains, InputGains])
def test_the_list_decides_where_the_shape_fits_both_forms(tmp_path: Path, cls: type[Gains]) -> None:
    with registered(SCALED, IA3), registered(SCALED, IA3_OF_INPUTS):
        bs.save(Adapter({"0": cls(torch.ones(1))}), tmp_path)
        assert type(bs.load(tmp_path)["0"]) is cls


def test_a_list_does_not_select_other_sites_by_the_ends_of_their_names(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with registered(SCALED, IA3), registered(SCALED, IA3_OF_INPUTS):
        adapter = Adapter({"10": Gains(torch.ones(4)), "0": InputGains(torch.ones(4))})
        listed = saved_config(tmp_path, adapter)["feedforward_modules"]
        again = bs.load(tmp_path)
    assert [type(again[site]) for site in ("10", "0")] == [Gains, InputGains]
    config = peft.IA3Config(target_modules=["0", "10"], feedforward_modules=listed)
    selects = peft.tuners.ia3.IA3Model._check_target_module_feedforward
    assert (selects(config, "0"), selects(config, "10")) == (True, False)


@pytest.mark.parametrize(
    ("of_inputs", "targets", "listed"),
    [
        (["a.down", "b.down"], ["down", "up"], ["down"]),
        (["a.down"], ["a.down", "a.up", "b.down", "b.up"], ["a.down"]),
        ([], ["down", "up"], []),
    ],
)
def test_the_config_lists_the_sites_of_a_form(
    of_inputs: list[str], targets: list[str], listed: list[str]
) -> None:
    paths = ["a.up", "a.down", "b.up", "b.down"]
    with registered(SCALED, IA3), registered(SCALED, IA3_OF_INPUTS):
        forms = {path: IA3_OF_INPUTS if path in of_inputs else IA3 for path in paths}
        card = bs.Card(target_modules=("up", "down"))
        config = write_config(dict.fromkeys(paths, (1, 1.0)), card, forms)
    assert (config["target_modules"], config["feedforward_modules"]) == (targets, listed)


def test_the_model_card_mentions_peft_only_if_its_lora_has_the_update(tmp_path: Path) -> None:
    scaled = Scaled(torch.ones(3, 1), torch.ones(1, 8), torch.ones(8))
    pointwise = PointwiseLowRank(torch.ones(3, 2), torch.ones(2, 8))
    for form, update in ((SCALED_FORM, scaled), (CONVOLUTIONS[1], pointwise)):
        with registered(SCALED, form):
            text = (
                bs.save(Adapter({"first": update}), tmp_path / form.update.__name__) / "README.md"
            ).read_text()
        assert ("With PEFT: `PeftModel" in text) == (update is pointwise)
        assert ("PEFT's LoRA has no Scaled. vLLM cannot load it" in text) == (update is scaled)


def test_an_update_without_a_form_is_refused_before_the_first_step(tmp_path: Path) -> None:
    base, steps = bs.Base(tiny_llama(), None, "tiny"), []
    with registered(SCALED):
        with pytest.raises(AdapterFileError, match="this format cannot hold a Scaled"):
            bs.train(base, examples(10), LORA, SETTINGS, out=tmp_path / "run", on_step=steps.append)
        assert not steps
        assert not (tmp_path / "run").exists()
        result = bs.train(base, examples(10), LORA, SETTINGS)  # in memory
    assert isinstance(next(iter(result.adapter.values())), Scaled)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_trainer_refuses_an_update_without_a_form_when_it_begins(tmp_path: Path) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path / "out"), report_to=[], use_cpu=True)
    with registered(SCALED), attach(tiny_llama(), LORA, trainable=True) as attachment:
        callback = bs.AdapterCallback(attachment)
        with pytest.raises(AdapterFileError, match="this format cannot hold a Scaled"):
            callback.on_train_begin(arguments, TrainerState(), TrainerControl())
