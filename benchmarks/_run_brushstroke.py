"""One run of `brushstroke.train` for a benchmark; prints its figures as one line of JSON."""

import json
import sys
import tempfile

import brushstroke as bs
from brushstroke.packed.memory import peak_memory

settings = json.loads(sys.argv[1])
base = bs.load_base(
    settings["base"], dtype=settings["dtype"], device=settings["device"], quantize=settings["quantize"]
)
losses: list[float] = []
with tempfile.TemporaryDirectory(dir=settings["scratch"]) as out:
    config = bs.TrainConfig(
        max_steps=settings["steps"],
        batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        seed=settings["seed"],
    )
    result = bs.train(
        base,
        settings["data"],
        bs.LoraConfig(rank=settings["rank"]),
        config,
        out=out,
        on_step=lambda event: losses.append(event.loss),
    )
reported = ("real_tokens", "trained_tokens", "computed_tokens", "seconds", "dtype")
print(
    json.dumps(
        {
            **{name: result.summary[name] for name in reported},
            "peak_bytes": peak_memory(base.device),  # the save in it, as on the other side
            "losses": losses,
        }
    )
)
