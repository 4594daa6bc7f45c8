"""An attached model under transformers' Trainer: only the adapter is written, and it loads."""

from pathlib import Path

import pytest
import torch

import brushstroke as bs
from toys import tiny_llama
from training_kit import examples


@pytest.mark.parametrize("strategy", ["no", "steps", "epoch"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_trainer_trains_an_attached_model(tmp_path: Path, strategy: str) -> None:
    from transformers import Trainer, TrainingArguments

    model = tiny_llama()
    rows = []
    for example in examples(8):
        padding = 40 - len(example)
        labels = [t if w else -100 for t, w in zip(example.tokens, example.weights, strict=True)]
        rows.append(
            {
                "input_ids": torch.tensor([*example.tokens, *[0] * padding]),
                "labels": torch.tensor([*labels, *[-100] * padding]),
                "attention_mask": torch.tensor([1] * len(example) + [0] * padding),
            }
        )
    attachment = bs.attach(model, bs.LoraConfig(rank=4), trainable=True)
    before = attachment.adapter()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_strategy=strategy,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    Trainer(
        model=model, args=arguments, train_dataset=rows, callbacks=[bs.AdapterCallback(attachment)]
    ).train()
    loaded = bs.load(tmp_path / "out" / "adapter")
    trained = attachment.adapter()
    attachment.detach()
    site = next(iter(trained))
    assert torch.equal(loaded[site].V, trained[site].V)  # type: ignore[attr-defined]
    assert not torch.equal(loaded[site].V, before[site].V)  # type: ignore[attr-defined]
    written = {path.name for path in tmp_path.rglob("*.safetensors")}
    assert written == {"adapter_model.safetensors"}
    steps = {"no": set(), "steps": {"adapter-1", "adapter-2", "adapter-3"}, "epoch": {"adapter-2"}}[strategy]
    found = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} - {"adapter"}
    assert found == steps


def test_unwritable_folder_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "README.md").write_text("mine", "utf-8")
    with bs.attach(tiny_llama(), bs.LoraConfig(rank=4), trainable=True) as attachment:
        arguments = TrainingArguments(output_dir=str(tmp_path / "out"), report_to=[], use_cpu=True)

        def begin(folder: str, overwrite: bool = False) -> None:
            callback = bs.AdapterCallback(attachment, folder, overwrite=overwrite)
            callback.on_train_begin(arguments, TrainerState(max_steps=20), TrainerControl())

        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(bs.errors.OutputError, match=r"README\.md was not written by brushstroke"):
            begin("~/first", overwrite=True)
        for written, folder in (("second", "~/second"), ("third-12", "~/third")):
            bs.save(attachment.adapter(), tmp_path / written)
            with pytest.raises(bs.errors.OutputError, match=rf"{written} is not empty"):
                begin(folder)
            begin(folder, overwrite=True)
        (tmp_path / "fourth-2024").mkdir()  # a year, not one of this training's steps
        (tmp_path / "fourth-2024" / "photo.txt").write_text("mine")
        begin("~/fourth")
        (tmp_path / "third-12" / "README.md").write_text("mine", "utf-8")
        (tmp_path / "third-12" / "brushstroke.json").unlink()
        with pytest.raises(bs.errors.OutputError, match=r"third-12/README\.md was not written"):
            begin("~/third", overwrite=True)
