"""Descriptions of sites and of other modules of a model.

They hold no modules and no weights.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One adaptable weight W (d×h) of a model.

    Args:
        path: module path in the base model, such as "model.layers.0.self_attn.q_proj".
        d: input width.
        h: output width.
        kind: name of its `Kind`, such as "linear" (stored h×d) or "conv1d" (HF's Conv1D, stored d×h).
        aliases: further paths of the same module, if a model uses it several times.
        tied_to: another module that shares this weight tensor, such as the input embedding.
        is_output: whether it is the layer that computes the logits; groups such as all-linear leave it out.
        bypassed: why an adapter would have no effect or cannot be attached here, else None.
        frozen: why training would learn nothing here, else None.
        in_groups: whether groups of targets, such as all-linear, select it; otherwise it must be named.
    """

    path: str
    d: int
    h: int
    kind: str = "linear"
    aliases: tuple[str, ...] = ()
    tied_to: str | None = None
    is_output: bool = False
    bypassed: str | None = None
    frozen: str | None = None
    in_groups: bool = True

    @property
    def shape(self) -> tuple[int, int]:
        """(d, h)."""
        return self.d, self.h

    @property
    def name(self) -> str:
        """The last part of the path, such as "q_proj"."""
        return self.path.rsplit(".", 1)[-1]

    @property
    def paths(self) -> tuple[str, ...]:
        """The path and its aliases."""
        return (self.path, *self.aliases)


@dataclass(frozen=True)
class Other:
    """A module or a bare parameter of a model that is not a site.

    Args:
        path: of the module or the parameter.
        kind: the module's class, such as "Conv2d", or "bare 3-D parameter".
        has_weight: whether it has its own weight of two or more axes and is no embedding; groups of
            targets then list it as left out.
        sites_below: names of sites below it.
    """

    path: str
    kind: str
    has_weight: bool = False
    sites_below: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """Why it is not a site, as a phrase.

        >>> Other("conv1", "Conv2d").reason
        'a Conv2d, which cannot be adapted yet'
        """
        article = "an" if self.kind[0] in "AEIOU" else "a"
        if self.sites_below:
            below = ", ".join(self.sites_below[:6])
            return f"{article} {self.kind} that holds other layers: name those ({below})"
        return f"{article} {self.kind}, which cannot be adapted yet"


def in_all_layers(path: str) -> str:
    """The path with a star for each number; it is the same for this module in all layers and all experts.

    >>> in_all_layers("layers.0.experts.12.w1")
    'layers.*.experts.*.w1'
    """
    return ".".join("*" if part.isdigit() else part for part in path.split("."))
