"""One run of `brushstroke.train` for a benchmark; prints its figures as one line of JSON."""

import json
import sys
import tempfile

import brushstroke as bs

settings = json.loads(sys.argv[1])
base = bs.load_base(settings["base"], dtype=settings["dtype"])
with tempfile.TemporaryDirectory(dir=settings["out"]) as out:
    config = bs.TrainConfig(
        max_steps=settings["steps"],
        batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
    )
    summary = bs.train(base, settings["data"], bs.LoraConfig(rank=8), config, out=out, overwrite=True).summary
print(
    json.dumps(
        {
            "real_tokens": summary["real_tokens"],
            "seconds": summary["seconds"],
            "real_tokens_per_second": summary["real_tokens_per_second"],
            "mean_loss": summary["mean_loss"],
            "peak_bytes": summary["peak_memory_bytes"],
        }
    )
)
