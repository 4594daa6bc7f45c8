"""Finds the model class that a config names; whether it is a language model; whether it needs remote code.

It loads no weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakIdKeyDictionary

from brushstroke.errors import BaseLoadError, ConfigError

Where = dict[str, Any]  # keyword arguments of `from_pretrained`: name or path, revision, trust_remote_code


def read_architecture(where: Where) -> tuple[Any, Any]:
    """The class of a model folder or hub id (with transformers' `from_pretrained`), and its config.

    It is the class that the first of the config's `architectures` names: from the folder's own code if there
    is any and it may run, otherwise from transformers. If the name is unknown, the class is
    AutoModelForCausalLM.

    Raises:
        BaseLoadError: the model needs remote code, which may not run.
    """
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(**where)
    except ValueError as error:
        raise (refused_code(where, "its config") if needs_own_code(error) else error) from error
    name = _class_name(config)
    known = _known_class(name)
    is_known = known is not None
    own = _own_code(config, name, named_only=is_known)
    if own is not None and where["trust_remote_code"]:
        return _own_class(*own, where), config
    if known is not None:
        return known, _part_for(known, config)
    if own is not None:
        raise refused_code(where, f"{name or 'the model'} ({own[1]})")
    return transformers.AutoModelForCausalLM, config


def unknown_class(config: Any) -> str | None:
    """The class name in a config ("none" without one) if it is unknown and has no remote code, else None."""
    name = _class_name(config)
    if _known_class(name) is not None or getattr(config, "auto_map", None):
        return None
    return name or "none"


def build_model(where: Where) -> nn.Module:
    """The model of a config, with its parameters on the meta device: shapes and names without memory.

    Its buffers have the values that the constructor computes.
    """
    made, config = read_architecture(where)
    with _parameters_on_meta():
        return made.from_config(config) if hasattr(made, "from_config") else made(config)


def is_language_model(made: Any, config: Any) -> bool:
    """Whether a class (or a model) predicts the next token of its input text.

    Args:
        made: the class of `read_architecture`, or a model.
        config: its config.
    """
    if getattr(config, "is_encoder_decoder", False):
        return False
    can_generate = getattr(made, "can_generate", None)
    if not callable(can_generate):  # not a class of transformers: assume a language model
        return True
    return bool(can_generate()) and made.main_input_name == "input_ids"


def require_language_model(made: Any, config: Any, name: str | None = None) -> None:
    """Refuse a model that is not a causal language model.

    Args:
        made: the class of `read_architecture`, or a model.
        config: its config.
        name: the name of the base, for the message.

    Raises:
        ConfigError: it is another kind of model.
    """
    if is_language_model(made, config):
        return
    kind = (made if isinstance(made, type) else type(made)).__name__
    raise ConfigError(
        f"{name or 'the base'} is a {kind}, and this needs a causal language model, one that predicts the "
        "next token; give such a base, or train this one with attach(model, config, trainable=True) and a "
        "loop of your own (merge accepts every kind of model)"
    )


def refused_code(where: Where, what: str) -> BaseLoadError:
    """The error for remote code that `what` needs and that may not run."""
    return BaseLoadError(
        f"{where['pretrained_model_name_or_path']} has its own code for {what}, which is not part of "
        "transformers; read that code, and if you trust it, allow it with --trust-remote-code "
        "(trust_remote_code=True)"
    )


def needs_own_code(error: Exception) -> bool:
    """Whether an error says that transformers refuses to run remote code."""
    return "trust_remote_code=True" in str(error)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Context manager: modules that this thread makes get their parameters on the meta device."""
    thread, moved = get_ident(), WeakIdKeyDictionary()  # a parameter may be registered in several modules

    def move(module: nn.Module, name: str, parameter: nn.Parameter) -> Any:
        if get_ident() != thread or parameter.is_meta or is_lazy(parameter):
            return None
        if parameter not in moved:
            moved[parameter] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        return moved[parameter]

    hook = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        hook.remove()


def _class_name(config: Any) -> str:
    """The first of a config's `architectures`, which may be a plain string; "" if there is none."""
    named = getattr(config, "architectures", None) or [""]
    return named if isinstance(named, str) else str(named[0])


def _known_class(name: str) -> type | None:
    """The model class of that name in transformers, or None."""
    import transformers

    known = getattr(transformers, name, None)
    return known if isinstance(known, type) and issubclass(known, transformers.PreTrainedModel) else None


def _part_for(made: Any, config: Any) -> Any:
    """The config or sub-config that a class expects: a text model expects the text config."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())]
    return next((part for part in parts if type(part) is made.config_class), config)


def _own_code(config: Any, name: str, *, named_only: bool) -> tuple[str, str] | None:
    """(Auto class, reference) of the remote code for class `name`, or for any model unless `named_only`."""
    known: dict[str, str] = getattr(config, "auto_map", None) or {}
    models = {auto: ref for auto, ref in known.items() if auto.startswith("AutoModel")}
    named = {auto: ref for auto, ref in models.items() if ref.rpartition(".")[2] == name}
    found = named or ({} if named_only else models)
    auto = "AutoModelForCausalLM" if "AutoModelForCausalLM" in found else next(iter(found), None)
    return None if auto is None else (auto, found[auto])


def _own_class(auto: str, reference: str, where: Where) -> Any:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.auto_factory import add_generation_mixin_to_remote_model

    name, revision = where["pretrained_model_name_or_path"], where.get("revision")
    found: Any = get_class_from_dynamic_module(reference, name, revision=revision)
    found.register_for_auto_class(auto)  # so that save_pretrained writes the code too
    return add_generation_mixin_to_remote_model(found)
