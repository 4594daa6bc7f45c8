"""What can be known of one adaptable weight without holding it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One adaptable weight W (d×h) of a model.

    Args:
        path: module path in the base model, such as "model.layers.0.self_attn.q_proj".
        d: input width.
        h: output width.
        kind: "linear" (weight stored h×d) or "conv1d" (HF's Conv1D, stored d×h).
        aliases: further paths of the same module, where a model uses it several times.
        tied_to: another module whose weight is this very tensor, such as the input embedding.
        is_output: the layer that makes the logits; groups such as all-linear leave it out.
        bypassed: why the model would not run this module's forward, where that is so.
    """

    path: str
    d: int
    h: int
    kind: str = "linear"
    aliases: tuple[str, ...] = ()
    tied_to: str | None = None
    is_output: bool = False
    bypassed: str | None = None

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


def is_conv1d(module: object) -> bool:
    """Whether a module is HF's Conv1D, whose weight is stored (d×h); told by the name of its class."""
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__) and hasattr(module, "nf")
