"""Three adapters on one frozen model: ask, train, switch, mix, judge, merge.

`make demo` runs it; `BRUSHSTROKE_DEMO=quick` is the short form. It leaves in demo-out/ the adapters, the rows
that it judged them on, results.json and report.html. What it measures is in `measure`; what it shows, in
`show` and `page`.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import measure
import page
import settings
import show

import brushstroke as bs
from brushstroke import samples

OUT = Path("demo-out")


def main() -> int:
    """Run the demo; returns the exit status."""
    try:
        run(settings.chosen(), OUT)
    except bs.errors.BrushstrokeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run it again to go on with the adapters that are finished", file=sys.stderr)
        return 130
    return 0


def run(form: settings.Settings, out: Path) -> dict[str, Any]:
    """The demo from beginning to end; returns what results.json holds."""
    begun = time.perf_counter()
    show.opening(form)
    files = {name: samples.labelled_file(name) for name in settings.NAMES}
    model_file = samples.model_path()
    jobs = {name: samples.read_task(name, file) for name, file in files.items()}
    heldout = {name: list(job.heldout[: form.held_out]) for name, job in jobs.items()}
    for name, rows in heldout.items():
        samples.write_rows(rows, out / "heldout" / f"{name}.jsonl")
    base = bs.load_base(model_file, dtype="float32")  # where merged and adapted give the same tokens
    show.loaded(base, measure.weight_bytes(base.model))

    show.heading("The untouched base is asked to split addresses into JSON")
    show.pairs(measure.first_words(base, heldout["addresses"][:2]))

    adapters, runs = {}, {}
    for name, job in jobs.items():
        show.heading(f"An adapter for {name}")
        folder = out / "adapters" / name
        runs[name] = measure.train_or_reuse(base, job.training[: form.rows[name]], folder, form)
        adapters[name] = bs.load(folder)
        show.trained(runs[name])

    show.heading(
        "Switching, and held-out rows of all kinds in mixed batches, each answered by its own adapter"
    )
    with bs.bank(base, adapters) as bank:
        switch_ms = measure.switch_ms(bank)
        judged = measure.judge(base, bank, heldout, form.base_rows)
    mixed = measure.mixed(judged, heldout)
    show.mixed(mixed, switch_ms)
    for name, found in judged.items():
        show.answers(name or "The untouched base, on addresses", found, limit=2)

    show.heading("Merging the address adapter into the weights")
    merged = measure.merged(base, adapters["addresses"], judged["addresses"], form)
    show.merged(merged)

    results = {
        "base": judged[None].as_dict(),
        "adapters": {
            name: {
                **judged[name].as_dict(),
                "real_tokens": run_record.real_tokens,
                "seconds": run_record.seconds,
                "adapter_bytes": (out / "adapters" / name / "adapter_model.safetensors").stat().st_size,
                "peak_memory_bytes": run_record.peak_memory_bytes,
            }
            for name, run_record in runs.items()
        },
        "merged": {"same_tokens": merged.same_tokens, "latency_ratio": merged.latency_ratio},
        "switch_ms": switch_ms,
        "base_bytes": measure.weight_bytes(base.model),
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    page.write(
        out / "report.html",
        form=form,
        results=results,
        before=judged[None],
        judged={name: judged[name] for name in runs},
        runs=runs,
        mixed=mixed,
        merged=merged,
        seconds=time.perf_counter() - begun,
    )
    show.closing(results, out, model_file, time.perf_counter() - begun)
    return results


if __name__ == "__main__":
    raise SystemExit(main())
