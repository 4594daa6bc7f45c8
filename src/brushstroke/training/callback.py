"""Saves only the adapter when transformers' Trainer trains an attached model.

It does not support the Trainer's own checkpoints, and therefore not its resume: they would write the factors
into the base's files.
"""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from brushstroke.errors import ConfigError
from brushstroke.formats import check_output, require_savable, save
from brushstroke.layers import Attachment


class AdapterCallback(TrainerCallback):
    """Writes the adapter whenever the Trainer would save the model, and at the end of training.

    Args:
        attachment: from `attach(model, LoraConfig(...), trainable=True)` on the Trainer's model.
        folder: for the finished adapter, by default `adapter` in the Trainer's output folder. The adapters
            that the Trainer's save strategy requests during training go to `adapter-STEP` in the same parent
            folder; all of them are kept, independent of save_total_limit.
        overwrite: replace the adapters of an earlier training in these folders; files with other names stay.
    """

    def __init__(
        self, attachment: Attachment, folder: str | Path | None = None, *, overwrite: bool = False
    ) -> None:
        self._attachment = attachment
        self._folder = Path(folder).expanduser() if folder else None
        self._overwrite = overwrite
        self._written: set[Path] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse settings that would save the whole model, and what cannot be written at the end.

        Raises:
            AdapterFileError: the adapter has a type of update that its files cannot hold.
            ConfigError: the save strategy is "best", or load_best_model_at_end is set.
            OutputError: one of the folders is not empty and may not be overwritten, or has files with an
                adapter's file names that another program wrote.
        """
        require_savable(self._attachment.adapter())
        if state.is_world_process_zero:
            for folder in self._targets(args, state):
                check_output(folder, self._overwrite or folder in self._written)
        if args.load_best_model_at_end:
            raise ConfigError(
                "AdapterCallback does not support load_best_model_at_end, because the Trainer saves no model "
                "here; leave it out, and load the adapter-STEP of your choice"
            )
        if getattr(args.save_strategy, "value", args.save_strategy) == "best":
            raise ConfigError(
                'AdapterCallback does not support save_strategy="best", which saves the model; '
                'use "steps" or "epoch"'
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the adapter instead of the model."""
        self._save_instead(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the adapter instead of the model."""
        self._save_instead(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the finished adapter."""
        if state.is_world_process_zero:
            self._save(self._target(args))

    def _save_instead(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        if control.should_save:
            control.should_save = False
            if state.is_world_process_zero and state.global_step < state.max_steps:
                target = self._target(args)
                self._save(target.with_name(f"{target.name}-{state.global_step}"))

    def _save(self, folder: Path) -> None:
        save(self._attachment.adapter(), folder, overwrite=True)
        self._written.add(folder)

    def _targets(self, args: TrainingArguments, state: TrainerState) -> list[Path]:
        """The folder of the finished adapter, and existing adapter-STEP folders to be overwritten."""
        target = self._target(args)
        if getattr(args.save_strategy, "value", args.save_strategy) == "no":
            return [target]
        found = [(path, path.name.removeprefix(f"{target.name}-")) for path in target.parent.glob("*")]
        return [target, *(path for path, step in found if step.isdecimal() and int(step) < state.max_steps)]

    def _target(self, args: TrainingArguments) -> Path:
        return self._folder or Path(args.output_dir or ".") / "adapter"
