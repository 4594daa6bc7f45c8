"""One run of PEFT under the Trainer with its default settings; prints its figures as one line of JSON."""

import json
import logging
import resource
import sys
import tempfile
import time
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

import brushstroke as bs
from brushstroke.data import encode

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
settings = json.loads(sys.argv[1])
base = bs.load_base(settings["base"], dtype=settings["dtype"])  # only loads: nothing of ours is in the model
examples = [
    {
        "input_ids": list(example.tokens),
        "attention_mask": [1] * len(example),
        "labels": [t if w else -100 for t, w in zip(example.tokens, example.weights, strict=True)],
    }
    for example in encode(settings["data"], base.tokenizer)
]
config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(base.model, config)


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


clock = Clock()
with tempfile.TemporaryDirectory(dir=settings["out"]) as out:
    arguments = TrainingArguments(
        output_dir=out,
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    collator = DataCollatorForSeq2Seq(base.tokenizer, label_pad_token_id=-100)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=examples, data_collator=collator, callbacks=[clock]
    )
    trainer.train()
    model.save_pretrained(out)
real_tokens = sum(len(example["input_ids"]) for example in examples)
print(
    json.dumps(
        {
            "real_tokens": real_tokens,
            "seconds": clock.seconds,
            "real_tokens_per_second": real_tokens / clock.seconds,
            "mean_loss": sum(clock.losses) / len(clock.losses),
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    )
)
