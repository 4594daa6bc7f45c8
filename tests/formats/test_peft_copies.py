"""Adapter files that contain more than factors: names of adapters, copies of base weights, training state."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import toys
from brushstroke import attach, bank, load, merge, save
from brushstroke.adapter import Adapter
from brushstroke.base import FolderWeights
from brushstroke.errors import BaseMismatchError
from brushstroke.sites import ChangedWeightsWarning, check_base

LOGITS = 1e-5  # fp32: the two sides add up in another order
TOKENS = torch.arange(24).reshape(2, 12) % toys.VOCABULARY
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def trained(base: nn.Module, **settings: Any) -> peft.PeftModel:
    """PEFT's model over this base, with factors that are not zero."""
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=6, **settings))
    for key, parameter in model.named_parameters():
        if "lora_A" in key or "lora_B" in key:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def written(folder: Path, base: nn.Module | None = None, *, embeddings: bool = True, **settings: Any) -> Path:
    """An adapter that PEFT saved, with the embeddings that it was asked for."""
    model = trained(base or toys.tiny_llama(), **{"target_modules": ["q_proj", "down_proj"], **settings})
    model.save_pretrained(folder, save_embedding_layers=embeddings)
    return folder


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


@pytest.mark.parametrize("name", ["default", "my-adapter_2"])
def test_keys_with_the_name_of_the_adapter_are_read(name: str, tmp_path: Path) -> None:
    plain = load(written(tmp_path, embeddings=False))

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(".weight", f".{name}.weight")] = tensors.pop(key)

    edit(tmp_path, rename)
    named = load(tmp_path)
    assert list(named) == list(plain)
    assert all(torch.equal(named[site].dense(), plain[site].dense()) for site in plain)


@pytest.mark.parametrize("name", ["default", "other"])
def test_the_state_of_a_whole_peft_model_is_read(name: str, tmp_path: Path) -> None:
    """As trainers leave it that save all of a model's tensors: every base weight stands in it too."""
    base = toys.tiny_llama()
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["q_proj"]), adapter_name=name
    ).eval()
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            nn.init.normal_(parameter, std=0.2)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]})
    )
    save_file(model.state_dict(), tmp_path / "adapter_model.safetensors")
    adapter, fresh = load(tmp_path), toys.tiny_llama()
    assert len(adapter) == 2
    assert set(adapter.copies) == {name for name, _ in fresh.named_parameters()}
    with attach(fresh, adapter):
        assert (logits(fresh) - logits(model)).abs().max() < LOGITS
    with pytest.raises(BaseMismatchError, match="rows differ"):
        attach(toys.tiny_llama(seed=1), adapter)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_copies_that_equal_the_base_are_dropped(targets: list[str], tmp_path: Path) -> None:
    base = toys.tiny_llama()
    model = trained(base, target_modules=targets)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    adapter, fresh = load(tmp_path / "theirs"), toys.tiny_llama()
    assert set(adapter.copies) == ({HEAD} if "lm_head" in targets else {EMBED, HEAD})
    assert "with copies of" in repr(adapter)
    with attach(fresh, adapter) as attachment:
        assert (logits(fresh) - logits(model)).abs().max() < LOGITS
        assert not attachment.adapter().copies
    with bank(fresh, {"a": adapter}) as several:
        several.use("a")
        assert (logits(fresh) - logits(model)).abs().max() < LOGITS
    assert (logits(merge(fresh, adapter)) - logits(model)).abs().max() < LOGITS


def test_saving_again_keeps_copies(tmp_path: Path) -> None:
    written(tmp_path / "theirs", target_modules=["q_proj", "lm_head"])
    before = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    save(load(tmp_path / "theirs"), tmp_path / "ours")
    after = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_algebra_keeps_the_copies(tmp_path: Path) -> None:
    adapter = load(written(tmp_path))
    for made in (2.0 * adapter, -adapter, adapter + adapter, adapter.truncate(1), adapter.to(torch.bfloat16)):
        assert set(made.copies) == {EMBED, HEAD}
        assert all(torch.equal(made.copies[name], adapter.copies[name]) for name in adapter.copies)
    assert set(adapter.with_card(None).copies) == {EMBED, HEAD}
    without = Adapter(adapter)
    assert set((without + adapter).copies) == set((adapter - without).copies) == {EMBED, HEAD}
    other = Adapter(adapter, copies={HEAD: adapter.copies[HEAD] + 1})
    with pytest.raises(BaseMismatchError, match=f"different copies of {HEAD}"):
        adapter + other


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["base_model.model.lm_head.weight"][5:7].add_(1e-6), rf"{HEAD}: 2 of 64 rows differ"),
        (
            lambda t: t["base_model.model.model.embed_tokens.weight"][63, 31].add_(1e-3),
            rf"{EMBED}: 1 of 64 rows differ",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(67, 32)}),
            rf"{HEAD}: the file's has shape \(67, 32\), the base's \(64, 32\)",
        ),
        (
            lambda t: t.update({"base_model.model.score.weight": torch.zeros(2, 32)}),
            r"score\.weight: the base has no such weight",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.full((64, 32), float("nan"))}),
            rf"{HEAD}: 64 of 64 rows differ",
        ),
    ],
)
def test_copies_that_differ_are_refused_by_name(
    change: Callable[[dict[str, torch.Tensor]], object], said: str, tmp_path: Path
) -> None:
    edit(written(tmp_path), change)
    adapter, base = load(tmp_path), toys.tiny_llama()
    before = toys.snapshot(base)
    uses: list[Callable[[], object]] = [
        lambda: attach(base, adapter),
        lambda: attach(base, adapter, trainable=True),
        lambda: attach(base, 2.0 * adapter),
        lambda: bank(base, {"a": adapter}),
        lambda: merge(base, adapter),
    ]
    for use in uses:
        with pytest.raises(BaseMismatchError, match=said):
            use()
    assert toys.snapshot(base) == before
    with pytest.warns(ChangedWeightsWarning, match=said), attach(base, adapter, allow_different_base=True):
        pass


@pytest.mark.parametrize("file", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float16])
def test_a_copy_may_be_kept_in_another_dtype(file: torch.dtype, own: torch.dtype, tmp_path: Path) -> None:
    written(tmp_path)
    weights = toys.tiny_llama().state_dict()

    def keep(tensors: dict[str, torch.Tensor], shift: float = 0.0) -> None:
        for name in (EMBED, HEAD):
            tensors[f"base_model.model.{name}"] = weights[name].to(file)
            tensors[f"base_model.model.{name}"][9, 9] += shift

    base = toys.tiny_llama(dtype=own)
    edit(tmp_path, keep)
    with attach(base, load(tmp_path)):
        pass
    edit(tmp_path, lambda tensors: keep(tensors, 0.1))
    with pytest.raises(BaseMismatchError, match="1 of 64 rows differ"):
        attach(base, load(tmp_path))


def test_a_packed_weight_cannot_be_compared(tmp_path: Path) -> None:
    base = toys.tiny_llama()
    base.lm_head.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(BaseMismatchError, match=rf"{HEAD}: the base's is packed \(torch.uint8\)"):
        attach(base, load(written(tmp_path)))


@pytest.mark.parametrize("tied", [False, True])
def test_copies_are_compared_with_files(tied: bool, tmp_path: Path) -> None:
    base = toys.tiny_llama(tied=tied)
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    weights = FolderWeights(tmp_path / "base")
    for name in (EMBED, HEAD):
        found = weights.parameter(name)
        assert found is not None
        assert torch.equal(found, base.state_dict()[name])
    assert weights.parameter("model.nothing.weight") is None
    adapter = load(written(tmp_path / "adapter", base))
    check_base(weights, adapter, weights=weights, parameter=weights.parameter)
    changed = Adapter(adapter, copies={EMBED: adapter.copies[EMBED] + 1})
    with pytest.raises(BaseMismatchError, match=f"{EMBED}: 64 of 64 rows differ"):
        check_base(weights, changed, weights=weights, parameter=weights.parameter)


@pytest.mark.parametrize("kind", ["velora", "monteclora"])
def test_training_only_entries_are_ignored(kind: str, tmp_path: Path) -> None:
    from peft.tuners.lora.config import MontecloraConfig, VeloraConfig

    variants: dict[str, Any] = {
        "velora": {"velora_config": VeloraConfig(num_groups=4)},
        "monteclora": {"monteclora_config": MontecloraConfig()},
    }
    model = trained(toys.tiny_llama(), target_modules=["q_proj"], **variants[kind])
    model.save_pretrained(tmp_path)
    kept = load_file(tmp_path / "adapter_model.safetensors")
    assert any(kind in key for key in kept)
    base = toys.tiny_llama()
    with attach(base, load(tmp_path)):
        assert (logits(base) - logits(model)).abs().max() < LOGITS


def test_ensured_ties_of_peft_are_in_the_file(tmp_path: Path) -> None:
    base = toys.tiny_llama(tied=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT finds no tied target
        model = trained(base, target_modules=["q_proj"], ensure_weight_tying=True)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["ensure_weight_tying"]
    fresh = toys.tiny_llama(tied=True)
    with attach(fresh, load(tmp_path)):
        assert (logits(fresh) - logits(model)).abs().max() < LOGITS
