"""The command `merge`: writes a base and an adapter as a model folder for plain transformers.

With --rows it then measures the losses of base, adapted and merged model.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from brushstroke.cli.adapters import load_adapter
from brushstroke.cli.console import emit_json, facts, print_text, results, share
from brushstroke.cli.early import check_data, say_what_was_read
from brushstroke.cli.options import Dtype
from brushstroke.cli.values import Count
from brushstroke.locate import require_base_files

if TYPE_CHECKING:
    from brushstroke.adapter import Adapter
    from brushstroke.data import Rows
    from brushstroke.inference import GainKept
    from brushstroke.merging import ExportReport


def merge(
    base: str,
    adapter: Path,
    *,
    out: Annotated[Path, Parameter()],
    overwrite: bool = False,
    allow_different_base: bool = False,
    dtype: Dtype = "auto",
    rounding: Literal["auto", "nearest", "stochastic"] = "auto",
    rounding_seed: Count = 0,
    verify: bool | None = None,
    rows: str | None = None,
    trust_remote_code: bool = False,
    json: bool = False,
) -> None:
    """Merge an adapter into new weights, and report how much the rounding changed.

    Args:
        base: A model folder, a hub id or a .gguf file.
        adapter: Folder or hub id of the adapter.
        out: The folder to write.
        overwrite: Replace the files of an earlier merge in --out; files with other names remain.
        allow_different_base: Allow an adapter that was trained on another base.
        dtype: Dtype of the merged weights. auto keeps the dtype of each tensor; another dtype loads the whole
            base.
        rounding: Rounding of weights in bfloat16 and float16. auto is stochastic where nearest keeps less
            than 99.5 % of the update.
        rounding_seed: Seed of the stochastic rounding; the same seed writes the same files.
        verify: Compare the merged with the adapted model [default: if that needs little memory].
        rows: Data on which to compare the losses of the base, the adapted and the merged model.
        trust_remote_code: Run Python code from the base's folder if transformers does not have its class.
        json: Print JSON on stdout.
    """
    from brushstroke.outputs import refuse_existing

    refuse_existing(out.expanduser(), overwrite)
    require_base_files(base)
    value = load_adapter(adapter)
    from brushstroke.merging import merge_folder

    data = None if rows is None else _read(rows, base, value, trust_remote_code)
    report = merge_folder(
        base,
        value,
        out,
        overwrite=overwrite,
        allow_different_base=allow_different_base,
        dtype=dtype,
        rounding=rounding,
        rounding_seed=rounding_seed,
        verify=verify,
        trust_remote_code=trust_remote_code,
    )
    gain = None
    if data is not None:
        from brushstroke.inference import gain_kept

        gain = gain_kept(
            base,
            value,
            report.out,
            data,
            allow_different_base=allow_different_base,
            trust_remote_code=trust_remote_code,
        )
    if json:
        emit_json(report.as_dict() | {"rows": gain and gain.as_dict()})
    else:
        _print(report, gain)


def _read(rows: str, base: str, adapter: "Adapter", trust_remote_code: bool) -> "Rows":
    """The rows of a data set; refused here, before the merge, if their losses could not be computed."""
    from brushstroke.data import read_rows

    data, card = read_rows(rows), adapter.card
    say_what_was_read(data)
    template = card.chat_template if card else None
    check_data(base, [data], chat_template=template, trust_remote_code=trust_remote_code)
    return data


def _print(report: "ExportReport", gain: "GainKept | None") -> None:
    console = results()
    print_text(console, f"merged into {report.out}", style="bold")
    drift, stochastic, count = report.logit_drift, report.merged.stochastic, len(report.sites)
    outputs = ", ".join(dict.fromkeys(name.partition(".")[0] for name in report.compared))
    facts(
        console,
        {
            "sites": f"{count:,}",
            "rounding": f"stochastic at {stochastic:,} of {count:,} sites, seed {report.rounding.seed}"
            if stochastic
            else "to nearest",
            "survived": f"{share(report.survived)} of ΔW at the worst site",
            "output drift": f"{report.output:.2g} at the worst site",
            "model drift": "" if drift is None else f"{drift:.2g} in its outputs ({outputs})",
            "effect": _effect(report),
            "loss": "" if gain is None else _loss(gain),
            "not measured": report.logit_drift_skipped or "",
            "untied": ", ".join(f"{site} from {other}" for site, other in report.untied),
            "chat template": "the adapter's" if report.chat_template_saved else "",
            "stop tokens": " ".join(report.stop_tokens_saved),
            "left out": ", ".join(report.left_out),
            "how": f"{'file by file' if report.streamed else 'in memory'}, {report.seconds:.1f} s",
        },
    )


def _effect(report: "ExportReport") -> str:
    if report.effect is not None:
        return f"{share(report.effect)} of the adapter's change of the outputs"
    return "not measured on outputs; what survived is of ΔW only"


def _loss(gain: "GainKept") -> str:
    kept = "" if gain.kept is None else f": {share(gain.kept)} of the gain"
    losses = f"{gain.base:.4f} base, {gain.adapted:.4f} adapted, {gain.merged:.4f} merged"
    return f"{losses}{kept} ({gain.rows:,} rows)"
