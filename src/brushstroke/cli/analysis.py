"""`spectrum`, `compare`, `relate` and `intruders`: what the numbers of adapters say.

The maths are those of `brushstroke.analysis`; the model is never run.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from brushstroke.checks import (
    check_alike,
    check_intruder_settings,
    check_share,
)
from brushstroke.cli.analysis_inputs import (
    AgainstBase,
    Count,
    check_fit,
    load_adapters,
    name_of,
    open_weights,
    site_progress,
    tell_of_cache,
)
from brushstroke.cli.analysis_tables import (
    TableOptions,
    as_json,
    told_intruders,
    told_overlap,
    told_relation,
    told_spectrum,
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
    """Show the singular values and ranks of adapters' updates, and cut one to the rank that it needs.

    Args:
        adapters: The adapters' folders, or their hub ids.
        base: A model folder, a hub id or a .gguf file, for the norms relative to its weights.
        map: Print a map of layers and matrices too, of this measure.
        truncate: Write the (one) adapter here, cut to the ranks of --energy or --budget.
        energy: Share of the energy to keep at every site when truncating [default: 0.99].
        budget: Parameters to keep in total when truncating, spread over the sites so that least is lost.
        overwrite: Replace what is in the folders of --truncate, --csv and --latex.
        allow_different_base: Measure even if the adapter was trained on another base.
        trust_remote_code: Run the code that the base brings along, where transformers lacks its class.
        json: Print JSON on stdout.
        html: Write a page with figures here.
    """
    if not adapters:
        raise ConfigError("expected at least one adapter's folder: brushstroke spectrum ADAPTER…")
    if truncate is None and (energy is not None or budget is not None):
        raise ConfigError("--energy and --budget are for truncating: name a folder with --truncate OUT")
    if energy is not None and budget is not None:
        raise ConfigError("give --energy or --budget, not both")
    if map == "relative" and base is None:
        raise ConfigError("--map relative is ‖ΔW‖/‖W‖: name the base with --base BASE")
    if truncate is not None and len(adapters) > 1:
        raise ConfigError(f"--truncate takes one adapter; got {len(adapters)}")
    from brushstroke.files import check_output_folder

    if truncate is not None:
        check_output_folder(truncate.expanduser(), overwrite)
    tables = tables or TableOptions()
    tables.check(overwrite, truncate)
    _check_page(html)
    if energy is not None:
        check_share(energy)
    check_fit(adapters, base)
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
    told = {name: told_spectrum(name, one) for name, one in found.items()}
    tables.write(told, overwrite)
    if html is not None:
        _write(html, lambda: _pages().spectrum_page(found))
    if json:
        from brushstroke.analysis import as_plain

        plain = [{"name": name, **as_json(one)} for name, one in told.items()]
        emit_json({"adapters": plain, "truncated": None if cut is None else as_plain(cut)})
        return
    for name, one in told.items():
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
    """Show what two adapters share: subspaces of any size, with chance beside them, and cosines.

    Args:
        first: The first adapter's folder, or its hub id.
        second: The second adapter's folder, or its hub id.
        of: Whose directions: of ΔW, or of the factor U or V alone, as the LoRA paper took them.
        site: Draw the whole grid of this site in --html; repeatable [default: the middle layer].
        overwrite: Replace what is in the folders of --csv and --latex.
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
    told = told_overlap(names, found)
    tables.write({" and ".join(names): told}, overwrite)
    if html is not None:
        _write(html, lambda: _pages().overlap_page(found, names, site or ()))
    if json:
        emit_json({"first": str(first), "second": str(second), **as_json(told)}, lines=True)
    else:
        print_overlap(told, found, tables.sites)


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
    """Show what an adapter amplifies in its base's weights, and what a random one would.

    Args:
        adapter: The adapter's folder, or its hub id.
        base: A model folder, a hub id or a .gguf file.
        overwrite: Replace what is in the folders of --csv and --latex.
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
    tell_of_cache(cache)
    told = told_relation(name_of(adapter), found)
    tables.write({name_of(adapter): told}, overwrite)
    if html is not None:
        _write(html, lambda: _pages().relation_page(found, name_of(adapter)))
    if json:
        emit_json({"adapter": str(adapter), "base": base, **as_json(told)})
    else:
        print_relation(told, found, tables.sites)


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
    """Find strong directions of base and adapter together that the base alone does not have.

    Args:
        adapter: The adapter's folder, or its hub id.
        base: A model folder, a hub id or a .gguf file.
        top: How many directions to judge at each site.
        threshold: The largest |cosine| with a singular vector of the base that an intruder may have.
        repair: Write the adapter here with its intruders scaled down.
        scale: The factor by which the repair scales an intruder [default: 0.75].
        overwrite: Replace what is in the folders of --repair, --csv and --latex.
        json: Print JSON on stdout.
        html: Write a page with figures here.
    """
    if scale is not None and repair is None:
        raise ConfigError("--scale is for the repair: name a folder with --repair OUT")
    if scale is not None and not 0 <= scale <= 1:
        raise ConfigError(f"--scale must be between 0 and 1; got {scale}")
    from brushstroke.files import check_output_folder

    if repair is not None:
        check_output_folder(repair.expanduser(), overwrite)
    tables = tables or TableOptions()
    tables.check(overwrite, repair)
    _check_page(html)
    against = against or AgainstBase()
    against.check()
    check_intruder_settings(top, threshold)
    check_fit((adapter,), base)
    value = load_adapters(adapter)[name_of(adapter)]
    from brushstroke.analysis import intruders as measure
    from brushstroke.analysis import repair as mend

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
    tell_of_cache(cache)
    if repair is not None:
        from brushstroke.formats import save

        save(mend(value, found, 0.75 if scale is None else scale), repair, overwrite=overwrite)
    told = told_intruders(name_of(adapter), found)
    tables.write({name_of(adapter): told}, overwrite)
    if html is not None:
        _write(html, lambda: _pages().intruder_page(found, name_of(adapter)))
    if json:
        emit_json({"adapter": str(adapter), "base": base, "repaired": repair, **as_json(told)})
    else:
        print_intruders(told, found, repair, tables.sites)


def _pages() -> Any:
    from brushstroke.report import analysis

    return analysis


def _check_page(file: Path | None) -> None:
    """Refuse a page that cannot be written, before all work."""
    from brushstroke.files import check_output_folder

    if file is not None:
        if file.expanduser().is_dir():
            raise OutputError(f"--html takes a file; {file} is a folder; name {file / 'page.html'}, say")
        check_output_folder(file.expanduser().parent, overwrite=True)


def _write(file: Path, make: "Callable[[], Page]") -> None:
    say(f"wrote {make().write(file.expanduser())}")
