"""The command `merge`: writes a base and an adapter as a model folder for plain transformers."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from brushstroke.cli.adapters import load_adapter
from brushstroke.cli.console import emit_json, facts, print_text, results, share
from brushstroke.cli.options import Dtype
from brushstroke.locate import require_base_files

if TYPE_CHECKING:
    from brushstroke.merging import ExportReport


def merge(
    base: str,
    adapter: Path,
    *,
    out: Annotated[Path, Parameter()],
    overwrite: bool = False,
    allow_different_base: bool = False,
    dtype: Dtype = "auto",
    verify: bool | None = None,
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
        verify: Compare the merged with the adapted model [default: if that needs little memory].
        trust_remote_code: Run Python code from the base's folder if transformers does not have its class.
        json: Print JSON on stdout.
    """
    from brushstroke.outputs import refuse_existing

    refuse_existing(out.expanduser(), overwrite)
    require_base_files(base)
    value = load_adapter(adapter)
    from brushstroke.merging import merge_folder

    report = merge_folder(
        base,
        value,
        out,
        overwrite=overwrite,
        allow_different_base=allow_different_base,
        dtype=dtype,
        verify=verify,
        trust_remote_code=trust_remote_code,
    )
    if json:
        emit_json(report.as_dict())
    else:
        _print(report)


def _print(report: "ExportReport") -> None:
    console = results()
    print_text(console, f"merged into {report.out}", style="bold")
    drift = report.logit_drift
    outputs = ", ".join(dict.fromkeys(name.partition(".")[0] for name in report.compared))
    facts(
        console,
        {
            "sites": f"{len(report.sites):,}",
            "survived": f"{share(report.survived)} of the update at the worst site",
            "output drift": f"{report.output:.2g} at the worst site",
            "model drift": "" if drift is None else f"{drift:.2g} in its outputs ({outputs})",
            "not measured": report.logit_drift_skipped or "",
            "untied": ", ".join(f"{site} from {other}" for site, other in report.untied),
            "chat template": "the adapter's" if report.chat_template_saved else "",
            "stop tokens": " ".join(report.stop_tokens_saved),
            "left out": ", ".join(report.left_out),
            "how": f"{'file by file' if report.streamed else 'in memory'}, {report.seconds:.1f} s",
        },
    )
