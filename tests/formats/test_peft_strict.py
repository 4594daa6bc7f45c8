"""Refusals of load and save: they name the place and write no files."""

import ctypes
import errno
import itertools
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from brushstroke import errors, load, save
from brushstroke.adapter import Adapter, Card, Fingerprint
from brushstroke.formats import peft
from brushstroke.formats.peft_forms import flags
from brushstroke.lowrank import LowRank, Update
from brushstroke.outputs import exchange, lock, replace, write
from sampling import sample

SITE = "model.layers.0.self_attn.q_proj"
A_KEY = f"base_model.model.{SITE}.lora_A.weight"
B_KEY = f"base_model.model.{SITE}.lora_B.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole adapter of two sites, rank 2."""
    generator = torch.Generator().manual_seed(0)
    sites = (SITE, "model.layers.1.self_attn.q_proj")
    updates = {
        site: LowRank(torch.randn(8, 2, generator=generator), torch.randn(2, 6, generator=generator), 2.0)
        for site in sites
    }
    return save(Adapter(updates, Card(target_modules=("q_proj",))), tmp_path / "adapter")


def digest(adapter: Adapter) -> dict[str, tuple[bytes, float]]:
    """All that makes the updates."""
    return {
        site: (u.U.contiguous().numpy().tobytes() + u.V.numpy().tobytes(), u.scale)
        for site, u in adapter.items()
        if isinstance(u, LowRank)
    }


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def refusal(folder: Path) -> str:
    with pytest.raises(errors.AdapterFileError) as caught:
        load(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "lora_only"),
        ("use_dora", True),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [5]),
        ("use_qalora", True),
        ("megatron_config", {"a": 1}),
        ("kasa_config", {"beta": 1e-4}),
        ("arrow_config", {"top_k": 3}),
        ("use_bdlora", {"nblocks": 2}),
        ("use_qa_lora", True),
        ("enable_lora", [True, False, True]),
        ("a_setting_of_tomorrow", 0.5),
        ("peft_type", "ADALORA"),
        ("peft_type", None),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("r", 0),
        ("r", "8"),
        ("r", True),
        ("lora_alpha", None),
        ("lora_alpha", "16"),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"(": 2}),
        ("alpha_pattern", {"q_proj": "4"}),
        ("use_rslora", "yes"),
        ("target_modules", 5),
        ("target_modules", [5]),
        ("base_model_name_or_path", ["x"]),
        ("task_type", 5),
    ],
)
def test_wrong_or_unsupported_config_fields_are_refused_by_name(folder: Path, field: str, value: Any) -> None:
    edit_config(folder, **{field: value})
    said = refusal(folder)
    assert "adapter_config.json" in said
    assert (next(iter(value)) if value == {"(": 2} else field) in said


@pytest.mark.parametrize("off", [None, False, 0, 0.0, "", [], {}])
def test_an_unknown_field_that_is_off_is_ignored(folder: Path, off: Any) -> None:
    edit_config(folder, a_setting_of_tomorrow=off, use_dora=off, bias="none")
    assert len(load(folder)) == 2


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_inits_that_do_not_change_the_base_are_accepted(folder: Path, init: Any) -> None:
    edit_config(folder, init_lora_weights=init, peft_version="9.9", runtime_config={"a": 1})
    assert len(load(folder)) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("unsloth_fixed", True),
        ("unsloth_version", "2026.1.1"),
        ("transformers_version", "5.24.0"),
        ("peft_version", "0.17.1"),
        ("auto_mapping", {"base_model_class": "LlamaForCausalLM", "unsloth_fixed": True}),
        ("ensure_weight_tying", True),
        ("exclude_modules", ["lm_head"]),
        ("layers_to_transform", [0, 1]),
        ("layers_pattern", "layers"),
        ("loftq_config", {"loftq_bits": 4}),
        ("eva_config", {"rho": 2.0}),
        ("corda_config", {"corda_method": "kpm"}),
        ("lora_ga_config", {"direction": "ArB2r"}),
        ("velora_config", {"num_groups": 4}),
        ("monteclora_config", {"num_samples": 8}),
        ("lora_dtype", "bfloat16"),
        ("lorap_lr_ratio", 16.0),
        ("lorap_emb_lr", 1e-6),
        ("merge_weights", True),
        ("qalora_group_size", 16),
    ],
)
def test_training_only_fields_are_ignored(folder: Path, field: str, value: Any) -> None:
    before = digest(load(folder))
    edit_config(folder, **{field: value})
    assert digest(load(folder)) == before


def test_every_field_of_the_installed_peft_is_handled() -> None:
    import dataclasses

    import peft as their_peft

    from brushstroke.formats import peft_config

    known = {*flags(), *peft_config._READ, *peft_config._NO_EFFECT, *peft_config._REFUSED}
    assert {field.name for field in dataclasses.fields(their_peft.LoraConfig)} <= known
    assert not peft_config._NO_EFFECT & set(peft_config._REFUSED)


def test_unknown_field_error_has_a_next_step(folder: Path) -> None:
    edit_config(folder, a_setting_of_tomorrow={"deep": "x" * 500})
    said = refusal(folder)
    assert "a_setting_of_tomorrow is {'deep': 'xxx" in said
    assert "take it out of the file, else merge the adapter with the tool that wrote it" in said
    assert len(said) < 500


def test_all_refused_fields_are_listed_at_once(folder: Path) -> None:
    edit_config(folder, use_qalora=True, modules_to_save=["head"], novelty=3)
    said = refusal(folder)
    assert all(name in said for name in ("use_qalora", "modules_to_save", "novelty"))


@pytest.mark.parametrize("name", ["r", "lora_alpha"])
def test_a_config_without_rank_or_alpha_is_refused(folder: Path, name: str) -> None:
    file = folder / "adapter_config.json"
    stored = json.loads(file.read_text())
    del stored[name]
    file.write_text(json.dumps(stored))
    assert name in refusal(folder)


def test_a_missing_factor_is_named(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(B_KEY))
    said = refusal(folder)
    assert SITE in said
    assert "no (usable) lora_B" in said


@pytest.mark.parametrize(
    "key",
    [
        f"base_model.model.{SITE}.lora_A.default.other.weight",
        f"base_model.model.{SITE}.lora_B.bias",
        f"base_model.model.{SITE}.lora_B.default.bias",
        f"base_model.model.{SITE}.lora_magnitude_vector",
        f"base_model.model.{SITE}.lora_magnitude_vector.default.weight",
        f"base_model.model.{SITE}.lora_diag",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.lm_head.modules_to_save.default.weight",
        "base_model.model.lm_head.weight_scale",
        "lm_head.weight",
        f"{SITE}.lora_A.weight",
    ],
)
def test_unexpected_tensor_is_named(folder: Path, key: str) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({key: torch.ones(2, 8)}))
    assert key in refusal(folder)


@pytest.mark.parametrize("kept", [False, True])
def test_two_adapters_in_one_file_are_refused_by_their_names(folder: Path, kept: bool) -> None:
    def name_them(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            own = tensors[key] if kept else tensors.pop(key)
            renamed = key if kept else key.replace(".weight", ".first.weight")
            tensors[renamed] = own
            tensors[key.replace(".weight", ".second.weight")] = own.clone()

    edit_tensors(folder, name_them)
    said = refusal(folder)
    assert "several adapters" in said
    assert "lora_A.second.weight" in said
    assert ("lora_A.weight" if kept else "lora_A.first.weight") in said


def test_file_with_only_copies_is_refused(folder: Path) -> None:
    edit_tensors(
        folder,
        lambda tensors: (tensors.clear(), tensors.update({"base_model.model.a.weight": torch.ones(2)})),
    )
    assert "it holds no factors" in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_refused(folder: Path, value: float) -> None:
    edit_tensors(folder, lambda tensors: tensors[A_KEY].view(-1)[3:4].fill_(value))
    assert A_KEY in refusal(folder)


def test_rank_that_differs_from_the_config_is_refused_with_both_shapes(folder: Path) -> None:
    edit_config(folder, r=4)
    said = refusal(folder)
    assert "(2, 8)" in said
    assert "(6, 2)" in said
    assert "rank 4" in said
    assert said.count("lora_A") == 2  # both sites, at once


@pytest.mark.parametrize("tensor", [torch.ones(2, 8, dtype=torch.int8), torch.ones(2, 8, 1)])
def test_factor_that_is_not_a_float_matrix_is_refused(folder: Path, tensor: torch.Tensor) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({A_KEY: tensor}))
    assert A_KEY in refusal(folder)


def test_factors_of_two_dtypes_are_refused(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.update({A_KEY: torch.ones(2, 8, dtype=torch.float16)}))
    assert "float16" in refusal(folder)


def test_a_damaged_tensor_file_is_refused(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    assert "damaged" in refusal(folder)


@pytest.mark.parametrize("field", ["lora_alpha", "alpha_pattern"])
def test_alpha_too_large_for_float_is_refused_briefly(folder: Path, field: str) -> None:
    edit_config(folder, **{field: 10**400 if field == "lora_alpha" else {"q_proj": 10**400}})
    said = refusal(folder)
    assert field in said
    assert "a float holds" in said
    assert len(said) < 400


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000, '{"base_name": "\\ud800"}'])
@pytest.mark.parametrize("name", ["adapter_config.json", "brushstroke.json"])
def test_broken_json_is_refused(folder: Path, name: str, text: str) -> None:
    (folder / name).write_bytes(text.encode("latin-1"))
    assert name in refusal(folder)


def test_unknown_card_field_is_refused_with_a_hint(folder: Path) -> None:
    file = folder / "brushstroke.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_nane": "x"}))
    said = refusal(folder)
    assert "brushstroke.json" in said
    assert "did you mean 'base_name'" in said


def test_a_card_of_another_adapter_is_refused(folder: Path) -> None:
    fingerprint = Fingerprint.of({SITE: torch.randn(5, 6)})
    card = Card(fingerprint=fingerprint)
    (folder / "brushstroke.json").write_text(json.dumps(card.as_dict()))
    said = refusal(folder)
    assert "(5, 6)" in said
    assert "(8, 6)" in said


def test_non_adapter_folder_error_suggests_nearby_adapters(folder: Path, tmp_path: Path) -> None:
    assert "sub-folder adapter" in refusal(tmp_path)
    assert "there is no folder" in refusal(tmp_path / "nowhere")
    assert "is a file" in refusal(folder / "README.md")
    (folder / "adapter_model.safetensors").unlink()
    assert "has not finished" in refusal(folder)
    (folder / "adapter_model.bin").write_bytes(b"")
    assert "pickle" in refusal(folder)


def test_non_empty_folder_is_refused_unchanged(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(errors.OutputError, match="overwrite"):
        save(2.0 * load(folder), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_overwrite_replaces_only_adapter_files(folder: Path) -> None:
    adapter = load(folder)
    save(adapter.with_card(Card(chat_template="x")), folder, overwrite=True)
    (folder / "notes.txt").write_text("mine")
    assert (folder / "chat_template.jinja").is_file()
    save(2.0 * adapter, folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "chat_template.jinja").exists()
    assert load(folder)[SITE].delta_norm() == pytest.approx(2 * adapter[SITE].delta_norm())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("README.md", "mine"),
        ("adapter_config.json", "mine"),
        ("adapter_config.json", '{"name": "mine"}'),
        ("adapter_config.json", '["peft_type"]'),
        ("brushstroke.json", '{"format": 1}'),
        ("adapter_model.safetensors", "mine"),
        ("chat_template.jinja", "mine"),
    ],
)
def test_overwriting_a_foreign_file_is_refused(folder: Path, tmp_path: Path, name: str, content: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    (other / name).write_text(content)
    with pytest.raises(errors.OutputError, match=rf"other/{name} was not written by brushstroke.*; move it"):
        save(load(folder), other, overwrite=True)
    assert {file.name: file.read_text() for file in other.iterdir()} == {"notes.txt": "mine", name: content}
    (other / name).unlink()
    save(load(folder), other, overwrite=True)
    assert (other / "notes.txt").read_text() == "mine"


def test_an_adapter_that_peft_wrote_is_overwritten(folder: Path) -> None:
    (folder / "brushstroke.json").unlink()
    (folder / "README.md").write_text("---\nbase_model: x\nlibrary_name: peft\n---\n")
    save(load(folder), folder, overwrite=True)
    assert "brushstroke" in (folder / "README.md").read_text()


def test_full_disk_leaves_no_folder(folder: Path, tmp_path: Path) -> None:
    adapter = load(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
        with pytest.raises(errors.OutputError, match="cannot write"):
            save(adapter, tmp_path / "new" / "deep")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "new").exists()


def test_failed_rename_keeps_the_old_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> bool:
        raise PermissionError(13, "Permission denied")

    adapter = load(folder)
    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(errors.OutputError, match="Permission denied"):
        save(adapter, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(replace, "exchange", refuse)
    with pytest.raises(errors.OutputError, match="Permission denied"):
        save(2.0 * adapter, folder, overwrite=True)
    monkeypatch.undo()
    assert load(folder)[SITE].delta_norm() == adapter[SITE].delta_norm()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


STEPS = ("mkdir", "rename", "replace", "link", "unlink", "rmdir")  # of `os`


def killed(action: Callable[[], object], steps: int) -> bool:
    """Do something in a process of its own that dies after so many changes of folders; whether it died."""
    child = os.fork()
    if not child:
        done = []

        def counted(step: Callable[..., Any]) -> Callable[..., Any]:
            def count(*args: Any, **kwargs: Any) -> Any:
                found = step(*args, **kwargs)
                done.append(step)
                if len(done) == steps:
                    os._exit(9)
                return found

            return count

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        replace.exchange = counted(replace.exchange)
        try:
            action()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] != 0


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a folder is replaced; the second where the system's call answers EINVAL."""
    if request.param == "two renames":
        refused = lambda first, second: ctypes.set_errno(errno.EINVAL) or -1  # noqa: E731
        monkeypatch.setattr(exchange, "_swap", lambda: refused)
    return request.param


@pytest.mark.parametrize("template", ["old", "new"])
def test_a_save_that_is_killed_leaves_the_old_adapter_or_the_new_one(
    folder: Path, tmp_path: Path, template: str, way: str
) -> None:
    adapter, steps, absent = load(folder), 1, 0
    named = adapter.with_card(Card(chat_template="x"))
    old, new = (named, 2.0 * adapter) if template == "old" else (adapter, 2.0 * named)
    wholes = [contents(save(value, tmp_path / str(n) / "adapter")) for n, value in enumerate((old, new))]
    found = set()
    while True:
        save(old, folder, overwrite=True)
        (folder / "notes.txt").write_text("mine")
        died = killed(lambda: save(new, folder, overwrite=True), steps)
        if folder.exists():
            found.add(digest(load(folder))[SITE])
            assert contents(folder) in [{**whole, "notes.txt": b"mine"} for whole in wholes]
        else:
            absent += 1
            assert "there is no folder" in refusal(folder)
        with pytest.raises(errors.OutputError, match="is not empty"):
            save(new, folder)
        assert contents(folder) in [{**whole, "notes.txt": b"mine"} for whole in wholes]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "adapter"]
        if not died:
            break
        steps += 1
    assert steps > 9
    assert len(found) == 2
    assert absent == (1 if way == "two renames" else 0)


@pytest.mark.sweep
def test_killed_recovery_is_continued(folder: Path, tmp_path: Path, way: str) -> None:
    adapter = load(folder)
    old, new = adapter.with_card(Card(chat_template="x")), 2.0 * adapter
    wholes = [contents(save(value, tmp_path / str(n) / "adapter")) for n, value in enumerate((old, new))]
    for steps, again in sample(list(itertools.product(range(1, 16), (1, 2, 3, 5))), 12):
        save(old, folder, overwrite=True)
        killed(lambda steps=steps: save(new, folder, overwrite=True), steps)
        killed(lambda: peft.check_output(folder, True), again)
        peft.check_output(folder, True)
        assert contents(folder) in wholes
        assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "adapter"]


def test_concurrent_saves_do_not_remove_each_others_folders(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, lock_shared, calls = load(folder), write.lock_shared, []
    whole = contents(save(2.0 * adapter, tmp_path / "new" / folder.name))

    def raced(partial: Path) -> int:
        calls.append(partial)
        if len(calls) == 1:  # the writer, before it has the lock of what it made
            peft.check_output(folder, True)
            assert not partial.exists()
        return lock_shared(partial)

    monkeypatch.setattr(write, "lock_shared", raced)
    save(2.0 * adapter, folder, overwrite=True)
    assert len(calls) == 2
    assert contents(folder) == whole


@pytest.mark.parametrize("read", ["read_object", "read_rule", "read_tensors", "read_template"])
def test_load_during_saves_reads_one_complete_adapter(
    folder: Path, monkeypatch: pytest.MonkeyPatch, read: str, way: str
) -> None:
    """Whatever file a load has come to, the folder that it opened stays until it is done."""
    old, reading = load(folder).with_card(Card(chat_template="old")), getattr(peft, read)
    new = (3.0 * old).with_card(Card(chat_template="new"))
    save(old, folder, overwrite=True)

    def raced(*args: Any) -> Any:
        save(new, folder, overwrite=True)
        save(new, folder, overwrite=True)
        return reading(*args)

    with monkeypatch.context() as patched:
        patched.setattr(peft, read, raced)
        found = load(folder)
    assert digest(found) == digest(old) != digest(new)
    assert found.card is not None
    assert found.card.chat_template == "old"
    assert digest(load(folder)) == digest(new)
    assert len(list(folder.parent.iterdir())) > 1  # the folder that was read
    save(new, folder, overwrite=True)
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_load_between_two_renames_reports_a_missing_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, rename, said = 2.0 * load(folder), os.rename, []

    def watched(source: Path, target: Path) -> None:
        rename(source, target)
        if not folder.exists():
            said.append(refusal(folder))

    monkeypatch.setattr(replace, "exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", watched)
    save(new, folder, overwrite=True)
    assert [text.partition(";")[0] for text in said] == [f"there is no folder {folder}"]
    assert digest(load(folder)) == digest(new)


def test_user_files_are_not_removed_as_leftovers(folder: Path, tmp_path: Path) -> None:
    linked, adapter = tmp_path / "linked", load(folder)
    places = [tmp_path / f".adapter.{ending}" for ending in ("partial-work", "partial-0123abcd", "old")]
    for place in (*places, linked):
        (place / "old").mkdir(parents=True)
        (place / "thesis.txt").write_text("mine")
        (place / "old" / "README.md").write_text("mine")
    (tmp_path / ".adapter.partial-abcdefab").symlink_to(linked)
    (tmp_path / ".adapter.partial-0123abce").write_text("mine")
    before = sorted(path for path in tmp_path.rglob("*") if folder not in path.parents)
    save(2.0 * adapter, folder, overwrite=True)
    shutil.rmtree(folder)
    save(adapter, folder)
    assert sorted(path for path in tmp_path.rglob("*") if folder not in path.parents) == before


def test_a_folder_that_a_user_made_after_a_kill_stays_and_so_does_the_old_adapter(folder: Path) -> None:
    adapter, before = load(folder), contents(folder)
    old = folder.with_name(".adapter.partial-0123abcd") / "old"
    (old.parent / "new").mkdir(parents=True)
    folder.rename(old)
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    with pytest.raises(errors.OutputError, match=r"README\.md was not written by brushstroke"):
        save(adapter, folder, overwrite=True)
    assert contents(folder) == {"README.md": b"mine"}
    assert contents(old) == before


@pytest.mark.parametrize("reason", ["current folder", "parent", "mount point"])
def test_a_folder_that_cannot_be_renamed_gets_its_files_one_by_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    adapter, place = load(folder).with_card(Card(chat_template="old")), folder.stat().st_ino
    save(adapter, folder, overwrite=True)
    place = folder.stat().st_ino
    if reason == "current folder":
        monkeypatch.chdir(folder)
    elif reason == "parent":
        monkeypatch.setattr(os, "access", lambda path, mode: path != folder.parent)
    else:
        monkeypatch.setattr(os.path, "ismount", lambda path: path == folder)
    (folder / "notes.txt").write_text("mine")
    save((2.0 * adapter).with_card(Card()), folder, overwrite=True)
    assert folder.stat().st_ino == place
    assert digest(load(folder)) == digest(2.0 * adapter)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "chat_template.jinja").exists()
    assert not [path for path in folder.parent.rglob("*") if ".partial-" in path.name]


def test_a_folder_by_the_name_of_a_file_is_refused(folder: Path) -> None:
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "README.md").mkdir()
    (folder / "README.md" / "mine").write_text("mine")
    with pytest.raises(errors.OutputError, match=r"README\.md was not written by brushstroke"):
        save(load(folder), folder, overwrite=True)


def test_partial_folder_of_a_running_save_is_kept(folder: Path) -> None:
    adapter, before = load(folder), contents(folder)
    work = folder.with_name(".adapter.partial-0123abcd")
    (work / "new").mkdir(parents=True)
    folder.rename(work / "old")
    handle = lock.lock_shared(work)
    assert "there is no folder" in refusal(folder)
    with pytest.raises(errors.OutputError, match=r"another process is replacing .*abcd/old; wait for it"):
        save(adapter, folder)
    assert contents(work / "old") == before
    os.close(handle)
    with pytest.raises(errors.OutputError, match="is not empty"):
        save(adapter, folder)
    assert contents(folder) == before
    assert not work.exists()


def test_unsupported_adapters_are_refused_before_writing(tmp_path: Path) -> None:
    other: Any = type("Dora", (Update,), dict.fromkeys(Update.__abstractmethods__))()
    fine = LowRank(torch.ones(3, 1), torch.ones(1, 2))
    updates = {
        "a": other,
        "b": LowRank(torch.full((3, 1), torch.nan), torch.ones(1, 2)),
        "c": LowRank(torch.ones(3, 0), torch.ones(0, 2)),
        "d": fine,
        "e": fine * float("nan"),
        "f": fine * 1e308 * 10.0,
    }
    with pytest.raises(errors.AdapterFileError) as caught:
        save(Adapter(updates), tmp_path / "out")
    said = str(caught.value)
    assert "cannot hold a Dora" in said
    assert all(f"\n  {site}: " in said for site in "abcef")
    assert "\n  d: " not in said
    assert not (tmp_path / "out").exists()


def test_factors_that_are_views_are_saved_correctly(tmp_path: Path, llama: nn.Module) -> None:
    big = torch.randn(64, 64)
    adapter = Adapter({"fc": LowRank(big[:5, :2], big[:2, 7:13], 1.0)})
    again = load(save(adapter, tmp_path / "out"))["fc"]
    assert torch.equal(again.dense(), adapter["fc"].dense())


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can be somebody else")
def test_load_ignores_a_partial_folder_of_another_user(folder: Path) -> None:
    own, staging = digest(load(folder)), folder.with_name(".adapter.partial-0123abcd")
    staging.mkdir(mode=0o700)
    for level in (folder, *folder.parents):
        if level.stat().st_uid == os.getuid() and level != Path("/tmp"):
            level.chmod(level.stat().st_mode | 0o055)
    reading, writing = os.pipe()
    if not (child := os.fork()):
        try:
            os.setuid(65534)
            reported = "same" if digest(load(folder)) == own else "other"
            (folder / "x").mkdir()
        except BaseException as error:
            reported = f"{reported} {error}" if isinstance(error, PermissionError) else f"failed: {error!r}"
        os.write(writing, reported.encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 500).decode().startswith("same [Errno 13]")
    assert staging.is_dir()


def test_unreadable_files_are_not_called_damaged(folder: Path) -> None:
    assert "cannot be read: File name too long" in refusal(folder / ("x" * 300))
