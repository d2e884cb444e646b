"""Data sets by name: small ones that need no download, any ``.npz`` file, and folders of files that are mapped."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxfed import checks
from jaxfed.data.archives import Archive, npz, npz_arrays
from jaxfed.data.federated import FederatedData
from jaxfed.data.partition import PARTITIONS, check_options
from jaxfed.data.rows import scalar

FEATURES, CLASSES = 60, 10
_MOST_ROWS = 1000


def digits() -> dict[str, np.ndarray]:
    """Handwritten digits of 8x8 pixels that come with scikit-learn: 1797 examples, 10 classes, no clients.

    Returns:
        ``x`` float32 ``[1797, 64]`` from 0 to 1 and ``y`` int32 ``[1797]``.

    >>> {key: (array.shape, array.dtype.name) for key, array in digits().items()}
    {'x': ((1797, 64), 'float32'), 'y': ((1797,), 'int32')}
    """
    try:
        from sklearn.datasets import load_digits  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError('digits() needs scikit-learn. Install it with  pip install "jaxfed[run]"') from error
    x, y = load_digits(return_X_y=True)
    return {"x": np.asarray(x / 16, np.float32), "y": np.asarray(y, np.int32)}


def synthetic(alpha: float, beta: float, *, clients: int = 30, seed: int, iid: bool = False) -> FederatedData:
    r"""FedProx's synthetic(alpha, beta): logistic labels whose weights and inputs differ from client to client.

    .. math:: u_k \sim N(0, \alpha), \; B_k \sim N(0, \beta), \; v_{kj} \sim N(B_k, 1), \; W_k, b_k \sim N(u_k, 1), \\
        x \sim N(v_k, \mathrm{diag}(j^{-1.2})), \quad y = \mathrm{argmax}(x W_k + b_k)

    Sizes are ``int(lognormal(4, 2)) + 50``. As in the authors' code, alpha and beta are standard deviations (the paper
    calls them variances) and NumPy's legacy generator draws in the same order. Their train and test rows, nine to one
    within each client, are ``synthetic(...).split(0.1, seed=...)``.

    Args:
        alpha: Standard deviation between the clients' models.
        beta: Standard deviation between the clients' inputs.
        iid: One model ``W, b ~ N(0, 1)`` and ``v = 0`` for all; alpha and beta must then be 0.

    Returns:
        ``x`` float32 ``[examples, 60]`` and ``y`` int32 from 0 to 9.

    >>> synthetic(1.0, 1.0, seed=0)
    FederatedData(clients=30, examples=22349, sizes=50/172.5/5162, x: float32[60], y: int32[])

    References:
        Li et al., `Federated Optimization in Heterogeneous Networks <https://arxiv.org/abs/1812.06127>`_, 2020
    """
    clients, alpha, beta, seed = _checked_synthetic(clients, alpha, beta, seed)
    if iid and (alpha or beta):
        raise ValueError(f"synthetic: with iid=True clients do not differ, so alpha and beta must be 0, got {alpha}, {beta}.")
    rng = np.random.RandomState(seed)
    # Sizes are drawn first: they are the same for all alpha and beta.
    sizes = rng.lognormal(4, 2, clients).astype(int) + 50
    rows = _iid_rows(rng, sizes) if iid else _heterogeneous_rows(rng, sizes, alpha, beta)
    x, y = (np.concatenate(column) for column in zip(*rows))
    arrays = {"x": x.astype(np.float32), "y": y.astype(np.int32)}
    return FederatedData.from_arrays(arrays, np.repeat(np.arange(clients), sizes))


def linear_mixture(
    *,
    clients: int = 300,
    components: int = 3,
    features: int = 150,
    alpha: float = 0.4,
    noise: float = 0.1,
    test_rows: int = 5000,
    published_labels: bool = False,
    seed: int,
) -> FederatedData:
    r"""FedEM's synthetic federation: every client mixes the same few linear classifiers in proportions of its own.

    .. math:: \theta_m \sim U(-1, 1)^d, \; \pi_k \sim \mathrm{Dir}(\alpha), \; x \sim U(-1, 1)^d, \; m \sim \pi_k, \quad
        y = [x \theta_m + N(0, \sigma^2) > 0]

    Training sizes are ``int(lognormal(4, 2)) + 50``, at most 1000. NumPy's legacy generator draws in the order of the authors'
    code, which FederatedScope shares.

    Args:
        components: How many classifiers.
        features: :math:`d`.
        alpha: Concentration of the clients' proportions; the smaller, the less alike are clients.
        noise: :math:`\sigma`.
        test_rows: Test rows of every client, drawn like its training rows.
        published_labels: As the authors' code labels, which writes the rows of every component over those of the first: rows
            past the largest component's count keep label 0, some 63 % of all. Published figures are of such labels.

    Returns:
        ``x`` float32 ``[examples, d]``, ``y`` int32 0 or 1, and ``is_test``, by which :meth:`FederatedData.split_by` splits.

    >>> train, test = linear_mixture(clients=20, test_rows=100, seed=0).split_by("is_test")
    >>> train.sizes.min().item(), set(test.sizes.tolist())
    (57, {100})

    References:
        Marfoq et al., `Federated Multi-Task Learning under a Mixture of Distributions <https://arxiv.org/abs/2108.10252>`_, 2021
    """
    counts = {"clients": clients, "components": components, "features": features}
    clients, components, features = (scalar(checks.count, f"linear_mixture.{k}", v, at_least=1) for k, v in counts.items())
    test_rows = scalar(checks.count, "linear_mixture.test_rows", test_rows, at_least=0)
    alpha = scalar(checks.number, "linear_mixture.alpha", alpha, above=0)
    noise = scalar(checks.number, "linear_mixture.noise", noise, at_least=0)
    rng = np.random.RandomState(scalar(checks.count, "linear_mixture.seed", seed, at_least=0, below=2**32))
    sizes = np.minimum(rng.lognormal(4, 2, clients).astype(int) + 50, _MOST_ROWS)
    proportions = [rng.dirichlet(np.full(components, alpha)) for _ in range(clients)]
    theta = rng.uniform(-1, 1, (components, features))
    rows = []
    for own, size in zip(proportions, sizes):
        for count in (size, test_rows):
            rows.append(_mixed_rows(rng, count, own, theta, noise, published_labels))
    x, y = (np.concatenate(column) for column in zip(*rows))
    halves = np.column_stack([sizes, np.full(clients, test_rows)])
    is_test = np.repeat(np.tile([0, 1], clients), halves.ravel()).astype(np.uint8)
    return FederatedData.from_arrays({"x": x, "y": y, "is_test": is_test}, np.repeat(np.arange(clients), halves.sum(1)))


def stored(path: str | Path) -> FederatedData:
    """A federation from a folder that :meth:`FederatedData.save` wrote, mapped into memory: it may be larger than that.

    Args:
        path: The folder.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: For a folder that is no federation, and for a file that is missing, cut short or altered.
    """
    return FederatedData.open(path)


FEDERATIONS: dict[str, Callable[..., FederatedData]] = {
    "synthetic": synthetic,
    "linear-mixture": linear_mixture,
    "npz": npz,
    "stored": stored,
}
"""Data sets that bring their clients."""

ARRAYS: dict[str, Callable[..., dict[str, np.ndarray]]] = {"digits": digits, "npz": npz_arrays}
"""Data sets that need a partition."""

DATASETS: dict[str, Callable[..., Any]] = {**ARRAYS, **FEDERATIONS}
"""All data sets by the names that a config uses."""


def load(
    name: str, *, partition: tuple[str, dict[str, Any]] | None = None, label_key: str = "y", **options: Any
) -> FederatedData:
    """The data set called ``name`` as a federation.

    Args:
        name: One of `DATASETS`.
        partition: Name and options of one of `PARTITIONS`. Needed where a data set has no clients (``digits``), refused
            where it has (``synthetic``). An ``npz`` has clients unless a partition is given.
        label_key: The array that the partition reads.
        options: Options of the data set.

    Raises:
        ValueError: For unknown names and options, and for a partition too many or too few.

    >>> load("digits", partition=("dirichlet", {"clients": 5, "alpha": 0.5, "seed": 0})).num_clients
    5
    >>> load("synthetic", alpha=1, beta=1, seed=0).num_clients
    30
    """
    deal = _checked(name, partition, options)
    if deal is None:
        return FEDERATIONS[name](**options)
    arrays = ARRAYS[name](**options)
    checks.known_name(f"array of {name!r}", label_key, arrays)
    return FederatedData.from_arrays(arrays, deal(arrays[label_key]))


def load_shard(
    name: str,
    *,
    num_shards: int,
    index: int,
    partition: tuple[str, dict[str, Any]] | None = None,
    label_key: str = "y",
    **options: Any,
) -> FederatedData:
    """As :func:`load` and then :meth:`FederatedData.shard`, for one of several processes.

    Of an ``.npz`` no more than the shard's own rows is ever in memory, and of what is mapped only they are read. What is drawn
    or comes with a library is made whole and cut.

    >>> load_shard("synthetic", alpha=1, beta=1, seed=0, num_shards=4, index=3).held
    range(24, 30)
    """
    shard = {"num_shards": num_shards, "index": index}
    if name != "npz":
        return load(name, partition=partition, label_key=label_key, **options).shard(**shard)
    deal = _checked(name, partition, options)
    with Archive(options["path"]) as archive:
        if deal is None:
            client_key = options.get("client_key", "client")
            ids = archive.read(client_key)
            names = archive.names(options.get("keys"), besides=client_key, rows=ids.size)
        else:
            names = archive.names(options.get("keys"))
            checks.known_name(f"array of {name!r}", label_key, names)
            ids = deal(archive.read(names[label_key]))
        return FederatedData.from_reader(lambda rows: archive.rows(names, rows, ids.size), ids, **shard)


def _checked(name: str, partition: Any, options: dict[str, Any]) -> Callable[[np.ndarray], np.ndarray] | None:
    """Who gets which row by their labels; None for a data set that brings its clients."""
    checks.known_name("data set", name, DATASETS)
    if partition is not None:
        scheme, scheme_options = _checked_partition(name, partition)
        check_options(f"data set {name!r}", ARRAYS[name], options)
        return lambda labels: PARTITIONS[scheme](labels, **scheme_options)
    if name not in FEDERATIONS:
        known = ", ".join(sorted(PARTITIONS))
        raise ValueError(f"Data set {name!r} has no clients of its own: give a partition, one of {known}.")
    check_options(f"data set {name!r}", FEDERATIONS[name], options)
    return None


def _checked_partition(name: str, chosen: Any) -> tuple[str, dict[str, Any]]:
    if name not in ARRAYS:
        raise ValueError(f"Data set {name!r} has its own clients: leave the partition out.")
    if not (isinstance(chosen, Sequence) and len(chosen) == 2 and isinstance(chosen[1], Mapping)):
        example = '("iid", {"clients": 10, "seed": 0})'
        raise TypeError(f"partition must be a name and its options, such as {example}, got {checks.describe(chosen)}.")
    scheme, options = chosen
    checks.known_name("partition", scheme, PARTITIONS)
    check_options(f"partition {scheme!r}", PARTITIONS[scheme], dict(options), given=("labels",))
    return scheme, dict(options)


def _checked_synthetic(clients: int, alpha: float, beta: float, seed: int) -> tuple[int, float, float, int]:
    return (
        scalar(checks.count, "synthetic.clients", clients, at_least=1),
        scalar(checks.number, "synthetic.alpha", alpha, at_least=0),
        scalar(checks.number, "synthetic.beta", beta, at_least=0),
        scalar(checks.count, "synthetic.seed", seed, at_least=0, below=2**32),
    )


def _heterogeneous_rows(rng: np.random.RandomState, sizes: np.ndarray, alpha: float, beta: float) -> list[tuple]:
    # The order of the draws is the authors'; another order would give other data.
    model_mean = rng.normal(0, alpha, len(sizes))
    input_mean = [rng.normal(mean, 1, FEATURES) for mean in rng.normal(0, beta, len(sizes))]
    rows = []
    for mean, center, size in zip(model_mean, input_mean, sizes):
        weight, bias = rng.normal(mean, 1, (FEATURES, CLASSES)), rng.normal(mean, 1, CLASSES)
        rows.append(_labelled(rng, weight, bias, center, size))
    return rows


def _iid_rows(rng: np.random.RandomState, sizes: np.ndarray) -> list[tuple]:
    weight, bias = rng.normal(0, 1, (FEATURES, CLASSES)), rng.normal(0, 1, CLASSES)
    return [_labelled(rng, weight, bias, np.zeros(FEATURES), size) for size in sizes]


def _labelled(
    rng: np.random.RandomState, weight: np.ndarray, bias: np.ndarray, center: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    # The same numbers as multivariate_normal with this diagonal, without its decomposition.
    x = center + rng.standard_normal((size, FEATURES)) * np.sqrt(np.arange(1, FEATURES + 1) ** -1.2)
    return x, np.argmax(x @ weight + bias, axis=1)


def _mixed_rows(
    rng: np.random.RandomState, size: int, proportions: np.ndarray, theta: np.ndarray, noise: float, published_labels: bool
) -> tuple[np.ndarray, np.ndarray]:
    counts = rng.multinomial(size, proportions)
    x = rng.uniform(-1, 1, (size, theta.shape[1]))
    y = np.zeros(size, np.int32)
    starts = np.zeros_like(counts) if published_labels else np.cumsum(counts) - counts
    for start, count, direction in zip(starts, counts, theta):
        own = slice(start, start + count)
        y[own] = x[own] @ direction + rng.normal(0, noise, count) > 0
    order = rng.permutation(size)
    return x[order].astype(np.float32), y[order]
