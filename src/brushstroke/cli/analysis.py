"""The commands `spectrum`, `compare`, `relate` and `intruders`.

`brushstroke.analysis` does the computations; no command runs the model.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from brushstroke.checks import (
    check_alike,
    check_integer,
    check_number,
)
from brushstroke.cli.analysis_inputs import (
    AgainstBase,
    Count,
    check_budget,
    check_fit,
    load_adapters,
    name_of,
    open_weights,
    report_cache_use,
    site_progress,
)
from brushstroke.cli.analysis_tables import (
    TableOptions,
    as_json,
    describe_intruders,
    describe_overlap,
    describe_relation,
    describe_spectrum,
)
from brushstroke.cli.analysis_text import (
    Measure,
    print_cut,
    print_intruders,
    print_overlap,
    print_relation,
    print_spectrum,
)
from brushstroke.cli.console import emit_json, say
from brushstroke.cli.values import Whole
from brushstroke.errors import ConfigError, OutputError, did_you_mean
from brushstroke.fetch import adapter_shapes

if TYPE_CHECKING:
    from brushstroke.report import Page


def spectrum(
    *adapters: Path,
    base: str | None = None,
    map: Measure | None = None,
    truncate: Path | None = None,
    energy: float | None = None,
    budget: Whole = None,
    overwrite: bool = False,
    allow_different_base: bool = False,
    trust_remote_code: bool = False,
    tables: TableOptions | None = None,
    json: bool = False,
    html: Path | None = None,
) -> None:
    """Show the singular values and ranks of adapters' updates; truncate an adapter to the rank that it needs.

    Args:
        adapters: Folders or hub ids of adapters.
        base: A model folder, a hub id or a .gguf file; adds norms relative to its weights.
        map: Also print a map of this measure by layer and matrix.
        truncate: Write the adapter here, truncated to the ranks of --energy or --budget; takes one adapter.
        energy: Share of the energy to keep at every site when truncating [default: 0.99].
        budget: Number of parameters to keep when truncating, distributed over the sites for the smallest
            loss.
        overwrite: Replace existing files in the folders of --truncate, --csv and --latex.
        allow_different_base: Allow an adapter that was trained on another base.
        trust_remote_code: Run Python code from the base's folder if transformers does not have its class.
        json: Print JSON on stdout.
        html: Write a page with figures here.
    """
    if not adapters:
        raise ConfigError("expected at least one adapter's folder: brushstroke spectrum ADAPTER…")
    if truncate is None and (energy is not None or budget is not None):
        raise ConfigError("--energy and --budget need --truncate OUT")
    if energy is not None and budget is not None:
        raise ConfigError("give --energy or --budget, not both")
    if map == "relative" and base is None:
        raise ConfigError("--map relative shows ‖ΔW‖/‖W‖ and needs --base BASE")
    if truncate is not None and len(adapters) > 1:
        raise ConfigError(f"--truncate takes one adapter; got {len(adapters)}")
    from brushstroke.outputs import check_output_folder

    if truncate is not None:
        check_output_folder(truncate.expanduser(), overwrite)
    tables = tables or TableOptions()
    tables.check(overwrite, truncate)
    _check_page(html)
    if energy is not None:
        check_number("--energy", energy, above=0, at_most=1)
    check_fit(adapters, base)
    if budget is not None:
        check_budget(adapters, budget)
    loaded = load_adapters(*adapters)
    from brushstroke.analysis import fit_budget, keep_energy
    from brushstroke.analysis import spectrum as measure

    weights = open_weights(base, trust_remote_code) if base is not None else None
    found = {
        name: measure(adapter, weights, allow_different_base=allow_different_base)
        for name, adapter in loaded.items()
    }
    cut = None
    if truncate is not None:
        (name,) = loaded
        cut = (
            fit_budget(found[name], budget)
            if budget is not None
            else keep_energy(found[name], 0.99 if energy is None else energy)
        )
        from brushstroke.formats import save

        save(cut.apply(loaded[name]), truncate, overwrite=overwrite)
    described = {name: describe_spectrum(name, one) for name, one in found.items()}
    tables.write(described, overwrite)
    if html is not None:
        _write(html, lambda: _pages().spectrum_page(found))
    if json:
        from brushstroke.analysis import as_plain

        plain = [{"name": name, **as_json(one)} for name, one in described.items()]
        emit_json({"adapters": plain, "truncated": None if cut is None else as_plain(cut)})
        return
    for name, one in described.items():
        print_spectrum(one, found[name], map, tables.sites)
    if cut is not None and truncate is not None:
        print_cut(truncate, cut)


def compare(
    first: Path,
    second: Path,
    *,
    of: Literal["delta", "U", "V"] = "delta",
    site: Annotated[list[str] | None, Parameter(negative=())] = None,
    overwrite: bool = False,
    tables: TableOptions | None = None,
    json: bool = False,
    html: Path | None = None,
) -> None:
    """Show the subspaces that two adapters share, with chance levels, and their cosines.

    Args:
        first: Folder or hub id of the first adapter.
        second: Folder or hub id of the second adapter.
        of: Compare the directions of ΔW, or of the factor U or V alone, as in the LoRA paper.
        site: Draw the full grid of this site in --html; repeatable [default: the middle layer].
        overwrite: Replace existing files in the folders of --csv and --latex.
        json: Print JSON on stdout.
        html: Write a page with figures here.
    """
    tables = tables or TableOptions()
    tables.check(overwrite)
    _check_page(html)
    shapes = [adapter_shapes(name) for name in (first, second)]
    if all(shapes):
        check_alike(*shapes)
        for path in site or ():
            if all(path not in one for one in shapes):
                raise ConfigError(f"--site: no result for the site {path!r}{did_you_mean(path, shapes[0])}")
    one, two = load_adapters(first)[name_of(first)], load_adapters(second)[name_of(second)]
    from brushstroke.analysis import subspace

    found = subspace(one, two, of=of)
    for path in site or ():
        if path not in found:
            try:
                found[path]
            except KeyError as error:
                raise ConfigError(f"--site: {error.args[0]}") from None
    names = (name_of(first), name_of(second))
    if names[0] == names[1]:
        names = (str(first), str(second))
    described = describe_overlap(names, found)
    tables.write({" and ".join(names): described}, overwrite)
    if html is not None:
        _write(html, lambda: _pages().overlap_page(found, names, site or ()))
    if json:
        emit_json({"first": str(first), "second": str(second), **as_json(described)}, lines=True)
    else:
        print_overlap(described, found, tables.sites)


def relate(
    adapter: Path,
    base: str,
    *,
    against: AgainstBase | None = None,
    overwrite: bool = False,
    tables: TableOptions | None = None,
    json: bool = False,
    html: Path | None = None,
) -> None:
    """Show which directions of its base's weights an adapter amplifies, compared with a random update.

    Args:
        adapter: Folder or hub id of the adapter.
        base: A model folder, a hub id or a .gguf file.
        overwrite: Replace existing files in the folders of --csv and --latex.
        json: Print JSON on stdout.
        html: Write a page with figures here.
    """
    tables = tables or TableOptions()
    tables.check(overwrite)
    _check_page(html)
    against = against or AgainstBase()
    against.check()
    check_fit((adapter,), base)
    value = load_adapters(adapter)[name_of(adapter)]
    from brushstroke.analysis import relate as measure

    weights = open_weights(base, against.trust_remote_code)
    cache = against.directions()
    found = measure(value, weights, on_site=site_progress(), cache=cache, **against.arguments())
    report_cache_use(cache)
    described = describe_relation(name_of(adapter), found)
    tables.write({name_of(adapter): described}, overwrite)
    if html is not None:
        _write(html, lambda: _pages().relation_page(found, name_of(adapter)))
    if json:
        emit_json({"adapter": str(adapter), "base": base, **as_json(described)})
    else:
        print_relation(described, found, tables.sites)


def intruders(
    adapter: Path,
    base: str,
    *,
    top: Count = 10,
    threshold: float = 0.5,
    repair: Path | None = None,
    scale: float | None = None,
    overwrite: bool = False,
    against: AgainstBase | None = None,
    tables: TableOptions | None = None,
    json: bool = False,
    html: Path | None = None,
) -> None:
    """Find strong directions of W + ΔW that the base's W does not have.

    Args:
        adapter: Folder or hub id of the adapter.
        base: A model folder, a hub id or a .gguf file.
        top: Number of directions to test at each site.
        threshold: A direction is an intruder if its |cosine| with every singular vector of W is below this.
        repair: Write the adapter here, with its intruders scaled down.
        scale: Factor by which --repair scales an intruder [default: 0.75].
        overwrite: Replace existing files in the folders of --repair, --csv and --latex.
        json: Print JSON on stdout.
        html: Write a page with figures here.
    """
    if scale is not None and repair is None:
        raise ConfigError("--scale needs --repair OUT")
    if scale is not None:
        check_number("--scale", scale, at_least=0, at_most=1)
    from brushstroke.outputs import check_output_folder

    if repair is not None:
        check_output_folder(repair.expanduser(), overwrite)
    tables = tables or TableOptions()
    tables.check(overwrite, repair)
    _check_page(html)
    against = against or AgainstBase()
    against.check()
    check_integer("--top", top)
    check_number("--threshold", threshold, above=0, at_most=1)
    check_fit((adapter,), base)
    value = load_adapters(adapter)[name_of(adapter)]
    from brushstroke.analysis import intruders as measure
    from brushstroke.analysis import repair as scale_down

    weights, cache = open_weights(base, against.trust_remote_code), against.directions()
    found = measure(
        value,
        weights,
        top=top,
        threshold=threshold,
        on_site=site_progress(),
        cache=cache,
        **against.arguments(),
    )
    report_cache_use(cache)
    if repair is not None:
        from brushstroke.formats import save

        save(scale_down(value, found, 0.75 if scale is None else scale), repair, overwrite=overwrite)
    described = describe_intruders(name_of(adapter), found)
    tables.write({name_of(adapter): described}, overwrite)
    if html is not None:
        _write(html, lambda: _pages().intruder_page(found, name_of(adapter)))
    if json:
        emit_json({"adapter": str(adapter), "base": base, "repaired": repair, **as_json(described)})
    else:
        print_intruders(described, found, repair, tables.sites)


def _pages() -> Any:
    from brushstroke.report import analysis

    return analysis


def _check_page(file: Path | None) -> None:
    """Refuse a page that cannot be written, before all work."""
    from brushstroke.outputs import check_output_folder

    if file is not None:
        if file.expanduser().is_dir():
            raise OutputError(f"--html takes a file; {file} is a folder; name {file / 'page.html'}, say")
        check_output_folder(file.expanduser().parent, overwrite=True)


def _write(file: Path, make: "Callable[[], Page]") -> None:
    say(f"wrote {make().write(file.expanduser())}")
