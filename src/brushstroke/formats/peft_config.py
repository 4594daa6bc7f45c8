"""Converts the fields of PEFT's `adapter_config.json` to ranks and scales, and back.

It reads and writes no files and no tensors.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from brushstroke.adapter import Card
from brushstroke.errors import AdapterFileError, did_you_mean
from brushstroke.formats.peft_forms import FORMS, LORA, Form, fields_of_types, flags, forms_of, has_rank

_RESIDUAL = "its base weights were changed when training began, so the factors alone are not the update"
_UNKNOWN = (
    "a setting that this version does not know; if it mattered in training alone, take it out of the file, "
    "else merge the adapter with the tool that wrote it"
)
_REFUSED = {  # fields that change the meaning of the factors, or add to them
    "bias": "it changes biases too",
    "lora_bias": "its second factors have biases",
    "modules_to_save": (
        "it holds whole copies of these modules, which cannot be attached or merged here yet; merge it with "
        "PEFT (merge_and_unload), or train it without them (where task_type is SEQ_CLS or TOKEN_CLS, PEFT "
        "adds a classifier's head automatically: leave task_type out)"
    ),
    "trainable_token_indices": "it replaces rows of the embedding",
    "target_parameters": "it adapts bare parameters (fused experts)",
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "it acts only after certain tokens (aLoRA)",
    "arrow_config": "it chooses among several adapters for each token (Arrow)",
    "kasa_config": "it has a diagonal between the factors and cuts singular values of the base (KaSA)",
    "use_qalora": "it pools its inputs (QA-LoRA)",
    "use_qa_lora": "it pools its inputs (QA-LoRA)",
    "use_bdlora": "its factors are block-diagonal (BD-LoRA)",
    "enable_lora": "it adapts parts of a fused matrix",
    "megatron_config": "its layers may be split over processes (Megatron)",
}
_HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
_READ = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights")
# These fields do not change the update: their effect is already in the file's tensors, or ended with the
# training. Fields of PEFT 0.2 to 0.21, of Unsloth (the first group) and of ms-swift (the last).
_NO_EFFECT = frozenset(
    (
        # where the adapter comes from
        *("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
        *("peft_version", "transformers_version", "unsloth_version", "unsloth_fixed"),
        # which modules were chosen: the keys of the file name them, each tied one separately
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
        "ensure_weight_tying",
        # how the factors began: what changes the base's weights too is refused by `init_lora_weights`
        *("eva_config", "corda_config", "lora_ga_config", "loftq_config"),
        # how training ran: dropout, VeLoRA's backward pass, MonteCLoRA's noise, dtypes, rates, kernels
        *("lora_dropout", "velora_config", "monteclora_config", "runtime_config", "merge_weights"),
        *("megatron_core", "qalora_group_size", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),
    )
)

Value = TypeVar("Value", int, float)


@dataclass(frozen=True)
class Rule:
    """Rank and scale of every site, as PEFT's fields give them.

    Args:
        rank: r of the sites that no key of `ranks` matches.
        alpha: alpha of the sites that no key of `alphas` matches.
        rslora: whether the scale is alpha/√r (arXiv:2312.03732) instead of alpha/r.
        ranks: key → r; the first key that matches a path counts.
        alphas: key → alpha, likewise.
        flags: the fields that a form of update can have (`flags`), and whether they are set.
        peft_type: the type of the updates.
        lists: the fields that list the sites of a form (`Form.lists_sites`), with their values.
    """

    rank: int
    alpha: int | float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, int | float]
    flags: Mapping[str, bool]
    peft_type: str
    lists: Mapping[str, Collection[str] | str]

    def rank_of(self, path: str) -> int:
        """The rank of a site."""
        return self.ranks.get(_pattern_key(self.ranks, path), self.rank)

    def alpha_of(self, path: str) -> int | float:
        """The alpha of a site."""
        return self.alphas.get(_pattern_key(self.alphas, path), self.alpha)

    def scale_of(self, path: str) -> float:
        """The factor in front of U·V."""
        return _scale(self.alpha_of(path), self.rank_of(path), self.rslora)

    def allows(self, form: Form, path: str) -> bool:
        """Whether a site may have a form: where a field lists the sites of a form, only those have it."""
        return all(
            bool(_listed(names, [path])) == (form.lists_sites == field) for field, names in self.lists.items()
        )

    def describe_lists(self, path: str) -> str:
        """Which fields list a site, for messages; empty if the config has no such fields."""
        return " and ".join(
            f"{field} {'lists it' if _listed(names, [path]) else 'does not list it'}"
            for field, names in self.lists.items()
        )


def read_rule(stored: Mapping[str, Any], where: str) -> Rule:
    """The ranks and scales that a stored config describes.

    A field that this version does not know is ignored if its value means "off" (null, false, 0, empty).

    Raises:
        AdapterFileError: fields would change the update, or values have a wrong type; all are listed.
    """
    types, kind = fields_of_types(), stored.get("peft_type")
    if kind not in list(types):
        known = " or ".join(map(repr, types))
        raise _unsupported(
            where, [f"peft_type is {kind!r}; expected {known}{did_you_mean(str(kind), list(types))}"]
        )
    stored = {types[kind].get(field, field): value for field, value in stored.items()}
    if not has_rank(kind):
        stored = {"r": 1, "lora_alpha": 1, **stored}
    problems = _refused_fields(
        stored, flags() | {name for form in forms_of(kind) for name in (*form.constants, form.lists_sites)}
    )
    for field, fits, wanted in _KINDS:
        if not fits(stored.get(field, _DEFAULTS.get(field))):
            problems.append(f"{field} is {stored.get(field)!r:.60}; expected {wanted}")
    for field in ("r", "lora_alpha"):
        if field not in stored:
            problems.append(f"{field} is not there; without it the update is not known")
    fields = {form.lists_sites for form in forms_of(kind) if form.lists_sites}
    lists = {field: stored[field] for field in fields if stored.get(field) is not None}
    for field, names in lists.items():
        if not _are_texts(names):
            problems.append(f"{field} is {names!r:.60}; expected a text or a list of texts")
    patterns = [stored.get(field) for field in ("rank_pattern", "alpha_pattern")]
    expressions = [names for names in lists.values() if isinstance(names, str)]
    for key in (*expressions, *(key for pattern in patterns if isinstance(pattern, dict) for key in pattern)):
        try:
            re.compile(key)
        except re.error as error:
            problems.append(f"{key!r} in a pattern is no regular expression ({error})")
    if problems:
        raise _unsupported(where, problems)
    return Rule(
        stored["r"],
        stored["lora_alpha"],
        bool(stored.get("use_rslora")),
        stored.get("rank_pattern") or {},
        stored.get("alpha_pattern") or {},
        {flag: bool(stored.get(flag)) for flag in flags()},
        kind,
        lists,
    )


def card_from(stored: Mapping[str, Any], rule: Rule, paths: Collection[str]) -> Card:
    """A card with the facts about an adapter's origin in a PEFT config."""
    targets = stored.get("target_modules")
    names = (targets,) if isinstance(targets, str) else tuple(targets or ())
    lora = {
        "rank": rule.rank,
        "alpha": rule.alpha,
        "targets": list(names or sorted(paths)),
        "scale_rule": "rslora" if rule.rslora else "standard",
        "dropout": stored.get("lora_dropout") or 0.0,
        "rank_pattern": dict(rule.ranks),
        "alpha_pattern": dict(rule.alphas),
    }
    return Card(
        base_name=stored.get("base_model_name_or_path") or None,
        lora=lora if has_rank(rule.peft_type) else None,
        target_modules=names if selects_exactly(names, paths) else (),
        task=stored.get("task_type") or None,
        conv1d=bool(stored.get("fan_in_fan_out")),
    )


def write_config(
    sites: Mapping[str, tuple[int, float]], card: Card, forms: Mapping[str, Form] | None = None
) -> dict[str, Any]:
    """The fields of PEFT's config for sites with these (rank, scale), as PEFT itself saves them.

    alpha is chosen so that PEFT computes each site's scale again: exactly wherever a number does so, else to
    the last bit of a float64.

    Args:
        sites: path → (rank, scale).
        card: of the adapter.
        forms: path → form, all of one type and flag; without it, all sites have LoRA's.
    """
    settings = card.lora or {}
    forms = forms or dict.fromkeys(sites, FORMS[0])
    form = next(iter(forms.values()))
    rslora = settings.get("scale_rule") == "rslora" and form.peft_type == LORA
    ranks = {path: rank for path, (rank, _) in sites.items()}
    alphas = {path: _alpha(rank, scale, rslora) for path, (rank, scale) in sites.items()}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    names, lists = _targets(card.target_modules, forms)
    shared = {
        "auto_mapping": None,
        "base_model_name_or_path": card.base_name,
        "exclude_modules": None,
        "fan_in_fan_out": card.conv1d,
        "inference_mode": True,
        "modules_to_save": None,
        "peft_type": form.peft_type,
        "revision": None,
        "target_modules": sorted(names),
        "task_type": card.task,
    }
    with_rank = {
        "alpha_pattern": _patterns(alphas, alpha),
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "r": rank,
        "rank_pattern": _patterns(ranks, rank),
    }
    of_lora = {
        "bias": "none",
        "corda_config": None,
        "eva_config": None,
        "init_lora_weights": True,
        "layer_replication": None,
        "loftq_config": {},
        "lora_bias": False,
        "lora_dropout": settings.get("dropout", 0.0),
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_dora": False,
        "use_rslora": rslora,
    }
    config = shared | (with_rank if has_rank(form.peft_type) else {})
    config |= of_lora if form.peft_type == LORA else {}
    for theirs, ours in fields_of_types()[form.peft_type].items():
        config[theirs] = (with_rank | of_lora)[ours]
        config.pop(ours, None)
    for used in forms.values():
        config |= used.constants
    return config | ({form.flag: True} if form.flag else {}) | lists


def _targets(
    names: Collection[str], forms: Mapping[str, Form]
) -> tuple[Collection[str], dict[str, list[str] | str]]:
    """Names that select all sites, and for each field that lists the sites of a form, what selects them.

    They are the given names if these select exactly the sites and those of each form, else the paths. A file
    of LoRA has only the fields of forms that the sites have, because PEFT's LoRA does not know these fields.
    """
    used = list(forms.values())
    paths = {
        form.lists_sites: [path for path, own in forms.items() if own is form]
        for form in forms_of(used[0].peft_type)
        if form.lists_sites and (form.peft_type != LORA or form in used)
    }
    chosen = {field: [name for name in names if _select([name], own)] for field, own in paths.items()}
    exact = all(_listed(chosen[field], forms) == own for field, own in paths.items())
    if exact and selects_exactly(names, forms):
        return names, dict(chosen)
    one_by_one = {field: _listed(own, forms) == own for field, own in paths.items()}
    return forms.keys(), {
        field: own if one_by_one[field] else "|".join(map(re.escape, own)) for field, own in paths.items()
    }


def selects_exactly(names: Collection[str], paths: Collection[str]) -> bool:
    """Whether a list of names, by PEFT's rule, selects all of these paths, and each name at least one."""
    hits = {name: _select([name], paths) for name in names}
    return all(hits.values()) and {path for found in hits.values() for path in found} == set(paths)


def _select(names: Collection[str], paths: Collection[str]) -> list[str]:
    return [path for path in paths if any(path == name or path.endswith("." + name) for name in names)]


def _listed(names: Collection[str] | str, paths: Collection[str]) -> list[str]:
    """The paths that a list of names selects by PEFT's rule for such fields; a text is an expression."""
    if isinstance(names, str):
        return [path for path in paths if re.fullmatch(names, path)]
    return [path for path in paths if path.endswith(tuple(names))]


def _pattern_key(keys: Collection[str], path: str) -> str:
    """The first key that matches the end of a path, from a dot on (PEFT's rule); else the path itself."""
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", path)), path)


def _scale(alpha: int | float, rank: int, rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if rslora else rank)


def _alpha(rank: int, scale: float, rslora: bool) -> int | float:
    near = scale * (math.sqrt(rank) if rslora else rank)
    tries = [float(round(near)), near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)]
    alpha = next((alpha for alpha in tries if _scale(alpha, rank, rslora) == scale), near)
    return int(alpha) if alpha.is_integer() else alpha


def _most_common(values: Mapping[str, Value]) -> Value:
    return Counter(values.values()).most_common(1)[0][0]


def _patterns(values: Mapping[str, Value], default: Value) -> dict[str, Value]:
    """Keys for the sites that deviate: their paths, anchored where a path would match other sites too."""
    deviating = {path: value for path, value in values.items() if value != default}
    plain = all(
        deviating.get(_pattern_key(deviating, path), default) == value for path, value in values.items()
    )
    return deviating if plain else {f"^{re.escape(path)}": value for path, value in deviating.items()}


def _unsupported(where: str, problems: list[str]) -> AdapterFileError:
    return AdapterFileError(
        f"{where} describes an adapter that this version does not support:\n  " + "\n  ".join(problems)
    )


def _refused_fields(stored: Mapping[str, Any], of_forms: Collection[str | None]) -> list[str]:
    problems = []
    init = stored.get("init_lora_weights", True)
    if init not in _HARMLESS_INITS:
        problems.append(
            f"init_lora_weights is {init!r}: {_RESIDUAL}; save it from PEFT with "
            f"path_initial_model_for_weight_conversion=..."
        )
    for field, value in stored.items():
        off = not value or (field == "bias" and value == "none")
        if off or field in _READ or field in _NO_EFFECT or field in of_forms:
            continue
        problems.append(f"{field} is {value!r:.60}: {_REFUSED.get(field, _UNKNOWN)}")
    return problems


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _map_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(fits(v) for v in value.values()))


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list) and all(isinstance(entry, str) for entry in value))


_DEFAULTS = {"r": 8, "lora_alpha": 8, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
_KINDS: list[tuple[str, Callable[[Any], bool], str]] = [
    ("r", _is_rank, "a whole number of at least 1"),
    ("lora_alpha", _is_number, "a number that a float holds"),
    ("use_rslora", lambda value: value is None or isinstance(value, bool), "true or false"),
    ("rank_pattern", _map_of(_is_rank), "an object of whole numbers of at least 1"),
    ("alpha_pattern", _map_of(_is_number), "an object of numbers that a float holds"),
    ("target_modules", _are_texts, "a text or a list of texts"),
    ("base_model_name_or_path", _is_text, "a text"),
    ("task_type", _is_text, "a text"),
]
