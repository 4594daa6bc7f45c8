"""One run of a peer for a benchmark; prints its figures as one line of JSON.

PEFT under transformers' Trainer ("peft"), the same with batches of similar length ("grouped", "best"), under
TRL's SFTTrainer ("trl"), Unsloth under SFTTrainer ("unsloth"), and all weights under the Trainer ("full").
"""

import json
import logging
import os
import sys
import tempfile
import time
import warnings

# Our loading of the model would limit these; a peer runs with torch's own values.
os.environ.update(LRU_CACHE_CAPACITY="1024", ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024")

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

import brushstroke as bs
from brushstroke.data import encode
from brushstroke.packed.memory import peak_memory

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
settings = json.loads(sys.argv[1])
peer = settings["side"]
# Only loads and tokenises: nothing of ours is in the model.
if peer == "unsloth":
    from unsloth import FastLanguageModel

    loaded, tokenizer = FastLanguageModel.from_pretrained(
        settings["base"], dtype=getattr(torch, settings["dtype"]), load_in_4bit=False
    )
else:
    base = bs.load_base(
        settings["base"], dtype=settings["dtype"], device=settings["device"], quantize=settings["quantize"]
    )
    loaded, tokenizer = base.model, base.tokenizer
examples = [
    {
        "input_ids": list(example.tokens),
        "attention_mask": [1] * len(example),
        "labels": [t if w else -100 for t, w in zip(example.tokens, example.weights, strict=True)],
    }
    for example in encode(settings["data"], tokenizer)
]
lora = LoraConfig(r=settings["rank"], lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")


class Clock(TrainerCallback):
    """The wall time of the loop, from the first step's beginning to the last one's end, and the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self.began = time.perf_counter()

    def on_log(
        self, args: object, state: object, control: object, logs: dict | None = None, **kwargs: object
    ) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def on_train_end(self, *args: object, **kwargs: object) -> None:
        self.seconds = time.perf_counter() - self.began


class Counted(DataCollatorForSeq2Seq):
    """The Trainer's own collator, counting the tokens that are not padding."""

    real = trained = computed = 0

    def __call__(self, features: list, return_tensors: str | None = None) -> dict:
        batch = super().__call__(features, return_tensors)
        self.real += int(batch["attention_mask"].sum())
        self.trained += int((batch["labels"] != -100).sum())
        self.computed += batch["input_ids"].numel()
        return batch


clock = Clock()
collator = Counted(tokenizer, label_pad_token_id=-100)
common = {
    "max_steps": settings["steps"],
    "per_device_train_batch_size": settings["batch_size"] // settings["peer_parts"],
    "gradient_accumulation_steps": settings["peer_parts"],
    "learning_rate": settings["learning_rate"],
    "seed": settings["seed"],
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": settings["device"] == "cpu",
}
with tempfile.TemporaryDirectory(dir=settings["scratch"]) as out:
    if peer in ("trl", "unsloth"):
        from trl import SFTConfig, SFTTrainer

        if peer == "unsloth":
            loaded = FastLanguageModel.get_peft_model(
                loaded,
                r=lora.r,
                lora_alpha=lora.lora_alpha,
                target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
                use_gradient_checkpointing=False,
            )
        arguments = SFTConfig(
            output_dir=out,
            **common,
            dataset_kwargs={"skip_prepare_dataset": True},
            bf16=settings["dtype"] == "bfloat16",
            gradient_checkpointing=False,
        )
        trainer = SFTTrainer(
            model=loaded,
            args=arguments,
            train_dataset=Dataset.from_list(examples),
            data_collator=collator,
            processing_class=tokenizer,
            peft_config=lora if peer == "trl" else None,
            callbacks=[clock],
        )
    else:
        model = loaded.requires_grad_(True) if peer == "full" else get_peft_model(loaded, lora)
        grouped = {"train_sampling_strategy": "group_by_length"} if peer in ("grouped", "best") else {}
        arguments = TrainingArguments(output_dir=out, **common, **grouped)
        trainer = Trainer(
            model=model, args=arguments, train_dataset=examples, data_collator=collator, callbacks=[clock]
        )
    trainer.train()
    trainer.save_model(out)
peak = peak_memory(torch.device(settings["device"]))
print(
    json.dumps(
        {
            "real_tokens": collator.real,
            "trained_tokens": collator.trained,
            "computed_tokens": collator.computed,
            "seconds": clock.seconds,
            "dtype": settings["dtype"],
            "peak_bytes": peak,
            "losses": clock.losses,
        }
    )
)
