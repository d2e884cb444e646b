"""Data of many clients: the container, the ways to deal examples over clients, data sets by name.

``jaxfed.data.partition`` is the module; its function of that name looks a partition up: ``partition.partition("iid", ...)``.
"""

from jaxfed.data.archives import npz, npz_arrays
from jaxfed.data.datasets import DATASETS, digits, linear_mixture, load, load_shard, synthetic
from jaxfed.data.federated import FederatedData
from jaxfed.data.partition import (
    PARTITIONS,
    by_similarity,
    dirichlet_by_client,
    dirichlet_by_label,
    iid,
    lognormal_sizes,
    natural,
    pathological,
    quantity_skew,
    shards,
)

__all__ = [
    "DATASETS",
    "PARTITIONS",
    "FederatedData",
    "by_similarity",
    "digits",
    "dirichlet_by_client",
    "dirichlet_by_label",
    "iid",
    "linear_mixture",
    "load",
    "load_shard",
    "lognormal_sizes",
    "natural",
    "npz",
    "npz_arrays",
    "pathological",
    "quantity_skew",
    "shards",
    "synthetic",
]
