"""The frozen base model: the lowest place where transformers is known."""

from brushstroke.base.device import choose_device, choose_dtype
from brushstroke.base.load import Base, load_base, quiet_transformers

__all__ = ["Base", "choose_device", "choose_dtype", "load_base", "quiet_transformers"]
