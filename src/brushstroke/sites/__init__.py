"""Sites, the adaptable weights of a model: finds them, describes kind, path and shape, and reads W (d×h).

It also checks whether an adapter fits a base. It changes no model.
"""

from brushstroke.sites.compatibility import (
    QuantisedBaseWarning,
    canonical_path,
    check_base,
    check_fingerprint,
)
from brushstroke.sites.copies import ChangedWeightsWarning
from brushstroke.sites.kinds import (
    KINDS,
    Kind,
    dense_dxh,
    has_plain_forward,
    kind_of,
    require_kind,
    weight_dxh,
)
from brushstroke.sites.site import Other, Site, in_all_layers
from brushstroke.sites.targets import TargetPlan, resolve_targets
from brushstroke.sites.walk import find_others, find_sites, site_module, unwrap
from brushstroke.sites.weights import ModelWeights, is_quantised, plain_weights, weights_of

__all__ = [
    "KINDS",
    "ChangedWeightsWarning",
    "Kind",
    "ModelWeights",
    "Other",
    "QuantisedBaseWarning",
    "Site",
    "TargetPlan",
    "canonical_path",
    "check_base",
    "check_fingerprint",
    "dense_dxh",
    "find_others",
    "find_sites",
    "has_plain_forward",
    "in_all_layers",
    "is_quantised",
    "kind_of",
    "plain_weights",
    "require_kind",
    "resolve_targets",
    "site_module",
    "unwrap",
    "weight_dxh",
    "weights_of",
]
