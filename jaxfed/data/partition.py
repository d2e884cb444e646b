"""Splits of one data set over clients: labels in, ``client_ids [examples]`` out, for `FederatedData.from_arrays`.

Every example goes to exactly one client, every client gets at least one, and equal seeds give equal splits. Where a
random draw leaves a client short, examples are moved from the largest clients; nothing is ever drawn again.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxfed import checks
from jaxfed.data.rows import generator, rank_within, scalar


def iid(labels: Any, *, clients: int, seed: int) -> np.ndarray:
    """Examples at random, as many for each client (within one).

    Args:
        labels: Labels ``[examples]``, or just the number of examples.

    >>> iid(6, clients=3, seed=0)
    array([0, 2, 2, 1, 0, 1])
    """
    examples = _count_examples(labels)
    clients = _checked_clients("iid", clients, examples)
    return generator("iid.seed", seed).permutation(examples) % clients


def dirichlet_by_label(labels: Any, *, clients: int, alpha: float, min_size: int = 1, seed: int) -> np.ndarray:
    r"""Deals each label's examples over the clients in proportions drawn from a Dirichlet: labels and sizes are skewed.

    .. math:: p_c \sim \mathrm{Dir}_N(\alpha, \dots, \alpha), \quad n_{i,c} = p_{c,i} n_c

    This is what most papers after Yurochkin et al. call Dirichlet. They draw anew until every client has ``min_size``
    examples, which for small ``alpha`` never ends; here the largest clients give examples away.

    Args:
        labels: Integers or strings ``[examples]``.
        alpha: Concentration: 0.1 gives a client few labels, 100 is nearly iid.
        min_size: Examples that each client has at least.

    >>> ids = dirichlet_by_label([0] * 50 + [1] * 50, clients=4, alpha=0.3, seed=1)
    >>> np.bincount(ids)
    array([51,  3,  1, 45])

    References:
        Yurochkin et al., `Bayesian Nonparametric Federated Learning <https://arxiv.org/abs/1905.12022>`_, 2019
    """
    where = "dirichlet_by_label"
    codes = _codes(labels)
    clients = _checked_clients(where, clients, len(codes), min_size)
    concentration = np.full(clients, _checked_alpha(where, alpha))
    rng = generator(f"{where}.seed", seed)
    ids = np.empty(len(codes), np.int64)
    for rows in _rows_by_label(codes, rng):
        ids[rows] = _cut(len(rows), rng.dirichlet(concentration))
    return _repair(ids, clients, min_size, rng)


def dirichlet_by_client(labels: Any, *, clients: int, alpha: float, seed: int) -> np.ndarray:
    r"""Draws each client's label proportions from a Dirichlet; all clients have equally many examples (within one).

    .. math:: q_i \sim \mathrm{Dir}_{\mathrm{classes}}(\alpha, \dots, \alpha), \quad \text{labels of client } i \sim q_i

    Examples are taken without replacement. Once a label is used up, the proportions of the others are scaled up, so the
    last clients to draw (the order is random) come nearer to what is left than to their own proportions. Hsu et al.
    write ``Dir(alpha p)`` with the label frequencies ``p``; for equally frequent labels their alpha is ``classes`` times ours.

    Args:
        labels: Integers or strings ``[examples]``.
        alpha: Concentration: 0.1 gives a client few labels, 100 is nearly iid.

    >>> labels = np.repeat([0, 1, 2], 40)
    >>> ids = dirichlet_by_client(labels, clients=4, alpha=0.1, seed=0)
    >>> [np.bincount(labels[ids == i], minlength=3).tolist() for i in range(4)]
    [[0, 30, 0], [0, 10, 20], [29, 0, 1], [11, 0, 19]]

    References:
        Hsu et al., `Measuring the Effects of Non-Identical Data Distribution <https://arxiv.org/abs/1909.06335>`_, 2019
    """
    where = "dirichlet_by_client"
    codes = _codes(labels)
    clients = _checked_clients(where, clients, len(codes))
    alpha = _checked_alpha(where, alpha)
    rng = generator(f"{where}.seed", seed)
    rows = _rows_by_label(codes, rng)
    left = np.array([len(r) for r in rows])
    taken = np.zeros((clients, len(rows)), np.int64)
    for client in rng.permutation(clients):
        size = len(codes) // clients + (client < len(codes) % clients)
        taken[client] = _draw_labels(left, size, rng.dirichlet(np.full(len(rows), alpha)), rng)
        left -= taken[client]
    return _deal(rows, taken, len(codes))


def shards(labels: Any, *, clients: int, shards_per_client: int = 2, seed: int) -> np.ndarray:
    """Sorts by label, cuts into equal shards (within one example) and deals each client ``shards_per_client`` of them.

    A shard may hold the end of one label and the start of the next, so a client can have a label more than shards.

    Args:
        labels: Integers or strings ``[examples]``.

    >>> shards([0, 1, 0, 1, 0, 1, 0, 1], clients=2, shards_per_client=1, seed=0)
    array([0, 1, 0, 1, 0, 1, 0, 1])

    References:
        McMahan et al., `Communication-Efficient Learning of Deep Networks <https://arxiv.org/abs/1602.05629>`_, 2017
    """
    codes = _codes(labels)
    per_client = scalar(checks.count, "shards.shards_per_client", shards_per_client, at_least=1)
    clients = _checked_clients("shards", clients, len(codes), per_client)
    owner = generator("shards.seed", seed).permutation(clients * per_client) // per_client
    shard = np.arange(len(codes)) * len(owner) // len(codes)
    ids = np.empty(len(codes), np.int64)
    ids[np.argsort(codes, kind="stable")] = owner[shard]
    return ids


def pathological(labels: Any, *, clients: int, labels_per_client: int, seed: int) -> np.ndarray:
    """Exactly ``labels_per_client`` labels for every client, and every label at some client.

    Each label has equally many holders (within one, but never more than it has examples), who share it equally.

    Args:
        labels: Integers or strings ``[examples]``.

    >>> labels = np.arange(12) % 4
    >>> ids = pathological(labels, clients=4, labels_per_client=2, seed=0)
    >>> [np.unique(labels[ids == i]).tolist() for i in range(4)]
    [[0, 2], [1, 3], [2, 3], [0, 1]]
    """
    codes = _codes(labels)
    clients = _checked_clients("pathological", clients, len(codes))
    rng = generator("pathological.seed", seed)
    rows = _rows_by_label(codes, rng)
    most = np.minimum([len(r) for r in rows], clients)
    holds = _holders(_even_quotas(most, _checked_slots(labels_per_client, clients, most), rng), clients, rng)
    ids = np.empty(len(codes), np.int64)
    for label, own in enumerate(rows):
        owners = rng.permutation(np.flatnonzero(holds[:, label]))
        ids[own] = owners[np.arange(len(own)) % len(owners)]
    return ids


def by_similarity(labels: Any, *, clients: int, similarity: float, seed: int) -> np.ndarray:
    """A share of all examples is dealt at random, the rest sorted by label and cut into one piece for each client.

    Sizes are equal within one. With ``similarity=0`` a client has few labels, with 1 all clients are alike.

    Args:
        labels: Integers or strings ``[examples]``.
        similarity: The share that is dealt at random, 0 to 1.

    >>> by_similarity([0, 1, 0, 1, 0, 1, 0, 1], clients=2, similarity=0.0, seed=0)
    array([0, 1, 0, 1, 0, 1, 0, 1])

    References:
        Karimireddy et al., `SCAFFOLD: Stochastic Controlled Averaging <https://arxiv.org/abs/1910.06378>`_, 2020
    """
    codes = _codes(labels)
    clients = _checked_clients("by_similarity", clients, len(codes))
    similarity = scalar(checks.number, "by_similarity.similarity", similarity, at_least=0, at_most=1)
    order = generator("by_similarity.seed", seed).permutation(len(codes))
    alike, rest = np.split(order, [round(similarity * len(codes))])
    dealt = np.arange(len(codes)) % clients
    pieces = np.bincount(dealt[len(alike) :], minlength=clients)
    ids = np.empty(len(codes), np.int64)
    ids[alike] = dealt[: len(alike)]
    ids[rest[np.argsort(codes[rest], kind="stable")]] = np.repeat(np.arange(clients), pieces)
    return ids


def quantity_skew(labels: Any, *, clients: int, alpha: float, min_size: int = 1, seed: int) -> np.ndarray:
    r"""Examples at random, sizes in proportions :math:`p \sim \mathrm{Dir}_N(\alpha, \dots, \alpha)`: only sizes are skewed.

    Args:
        labels: Labels ``[examples]``, or just the number of examples.
        alpha: Concentration: the smaller, the more unequal the sizes.
        min_size: Examples that each client has at least; the largest give them.

    >>> np.bincount(quantity_skew(100, clients=4, alpha=0.5, seed=0))
    array([24,  1, 54, 21])

    References:
        Li et al., `Federated Learning on Non-IID Data Silos <https://arxiv.org/abs/2102.02079>`_, 2022
    """
    concentration = _checked_alpha("quantity_skew", alpha)
    return _by_weights(
        "quantity_skew", labels, clients, min_size, seed, lambda rng, size: rng.dirichlet(np.full(size, concentration))
    )


def lognormal_sizes(labels: Any, *, clients: int, sigma: float, min_size: int = 1, seed: int) -> np.ndarray:
    r"""Examples at random, sizes in proportion to :math:`e^{\sigma z_i}, z_i \sim N(0, 1)`: a heavy tail, as among real users.

    Args:
        labels: Labels ``[examples]``, or just the number of examples.
        sigma: Standard deviation of the logarithm of the sizes; 0 makes them equal, FedProx uses 2.
        min_size: Examples that each client has at least; the largest give them.

    >>> np.bincount(lognormal_sizes(100, clients=4, sigma=1.0, seed=0))
    array([23, 17, 38, 22])
    """
    sigma = scalar(checks.number, "lognormal_sizes.sigma", sigma, at_least=0, at_most=100)
    return _by_weights("lognormal_sizes", labels, clients, min_size, seed, lambda rng, size: rng.lognormal(0, sigma, size))


def natural(labels: Any) -> np.ndarray:
    """The clients that the data has already, numbered in sorted order.

    Args:
        labels: The id of each example's client, ``[examples]`` integers or strings.

    >>> natural(["kim", "ada", "kim"])
    array([1, 0, 1])
    """
    return _codes(labels)


PARTITIONS: dict[str, Callable[..., np.ndarray]] = {
    "iid": iid,
    "dirichlet": dirichlet_by_label,
    "dirichlet-by-client": dirichlet_by_client,
    "shards": shards,
    "pathological": pathological,
    "similarity": by_similarity,
    "quantity-skew": quantity_skew,
    "lognormal-sizes": lognormal_sizes,
    "natural": natural,
}
"""Partitions by the names that a config uses. ``"dirichlet"`` is by label, as in most papers."""


def partition(name: str, labels: Any, **options: Any) -> np.ndarray:
    """The partition called ``name``, with its options checked.

    Raises:
        ValueError: For unknown names and options and for options that are missing, with those that are accepted.

    >>> partition("iid", 4, clients=2, seed=0)
    array([0, 0, 1, 1])
    >>> partition("iid", 4, client=2, seed=0)
    Traceback (most recent call last):
    ...
    ValueError: partition 'iid' has no option 'client'. Did you mean 'clients'? It accepts: clients, seed.
    """
    checks.known_name("partition", name, PARTITIONS)
    check_options(f"partition {name!r}", PARTITIONS[name], options, given=("labels",))
    return PARTITIONS[name](labels, **options)


def check_options(owner: str, function: Callable[..., Any], options: dict[str, Any], given: tuple[str, ...] = ()) -> None:
    """Raises ValueError unless ``options`` are arguments of ``function`` and none without a default is missing."""
    parameters = {name: p for name, p in inspect.signature(function).parameters.items() if name not in given}
    checks.known_options(owner, options, parameters)
    needed = [name for name, p in parameters.items() if p.default is p.empty and name not in options]
    if needed:
        raise ValueError(f"{owner} needs {checks.listing(needed)}. It accepts: {', '.join(parameters)}.")


def _codes(labels: Any) -> np.ndarray:
    """Labels as numbers 0..classes-1 in sorted order."""
    array = np.asarray(labels)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"labels must be 1-D with one label per example, got shape {array.shape}.")
    if array.dtype.kind in "OT" and all(isinstance(label, str) for label in array):
        array = array.astype(str)
    if array.dtype.kind not in "biuU":
        raise TypeError(f"labels must be integers or strings, got {array.dtype}, such as {array[0]!r}. Convert them.")
    return np.unique(array, return_inverse=True)[1]


def _count_examples(labels: Any) -> int:
    if np.ndim(labels):
        return len(_codes(labels))
    return scalar(checks.count, "number of examples", labels, at_least=1)


def _checked_clients(where: str, clients: int, examples: int, each: int = 1) -> int:
    clients = scalar(checks.count, f"{where}.clients", clients, at_least=1)
    each = scalar(checks.count, f"{where}.min_size", each, at_least=1)
    if clients * each > examples:
        needs = f"{clients} clients with {each} or more examples each need {clients * each}"
        raise ValueError(f"{where}: {needs}, got {examples} examples. Ask for fewer clients.")
    return clients


def _checked_alpha(where: str, alpha: float) -> float:
    # Gamma draws beyond would overflow; 1e12 is iid for any number of examples.
    return scalar(checks.number, f"{where}.alpha", alpha, above=0, at_most=1e12)


def _checked_slots(per_client: int, clients: int, most: np.ndarray) -> int:
    """Pairs of client and label, once these can be had: at most ``most[c]`` clients can hold label ``c``."""
    where = "pathological.labels_per_client"
    slots = clients * scalar(checks.count, where, per_client, at_least=1)
    if per_client > len(most):
        raise ValueError(f"{where} is {per_client}, but there are {len(most)} labels. Lower it.")
    if slots < len(most):
        raise ValueError(f"{where}: {clients} clients with {per_client} cannot hold all {len(most)} labels. Raise either.")
    if slots > most.sum():
        raise ValueError(
            f"{where}: {clients} clients with {per_client} labels need {slots} pairs of client and label; the examples of "
            f"rare labels allow {most.sum()}. Ask for fewer clients or labels."
        )
    return slots


def _rows_by_label(codes: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """The rows of each label, in random order."""
    order = np.lexsort((rng.permutation(len(codes)), codes))
    return np.split(order, np.cumsum(np.bincount(codes))[:-1])


def _cut(examples: int, shares: np.ndarray) -> np.ndarray:
    """The client of each of ``examples`` places when they are cut in these shares, each within one of its share."""
    ends = np.rint(np.cumsum(shares) / np.sum(shares) * examples)
    return np.searchsorted(ends[:-1], np.arange(examples), side="right")


def _by_weights(where: str, labels: Any, clients: int, min_size: int, seed: int, draw: Callable) -> np.ndarray:
    examples = _count_examples(labels)
    clients = _checked_clients(where, clients, examples, min_size)
    rng = generator(f"{where}.seed", seed)
    ids = rng.permutation(_cut(examples, draw(rng, clients)))
    return _repair(ids, clients, min_size, rng)


def _repair(ids: np.ndarray, clients: int, min_size: int, rng: np.random.Generator) -> np.ndarray:
    """Moves random examples, each from the client that is largest by then, until all have ``min_size``."""
    missing = np.maximum(int(min_size) - np.bincount(ids, minlength=clients), 0)
    # The row of highest rank within its client belongs to the largest client: no loop is needed.
    moved = np.argsort(rank_within(ids, rng), kind="stable")[len(ids) - missing.sum() :]
    ids[moved] = np.repeat(np.arange(clients), missing)
    return ids


def _draw_labels(left: np.ndarray, size: int, shares: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How many of each label a client takes: ``size`` draws by ``shares`` from the labels with examples ``left``."""
    taken = np.zeros_like(left)
    # Every pass but the last uses up a label, so there are at most as many passes as labels, and one.
    while (short := size - taken.sum()) > 0:
        open_shares = np.where(taken < left, shares, 0)
        if open_shares.sum() == 0:
            open_shares = (left - taken).astype(float)
        draws = rng.multinomial(short, open_shares / open_shares.sum())
        taken = np.minimum(taken + draws, left)
    return taken


def _deal(rows: list[np.ndarray], taken: np.ndarray, examples: int) -> np.ndarray:
    """Client ids from the rows of each label and how many of them each client takes, ``[N, classes]``."""
    ids = np.empty(examples, np.int64)
    for label, own in enumerate(rows):
        ids[own] = np.repeat(np.arange(len(taken)), taken[:, label])
    return ids


def _even_quotas(most: np.ndarray, slots: int, rng: np.random.Generator) -> np.ndarray:
    """How many clients hold each label: ``slots`` in all, as even as ``most[c]`` allows, remainders at random."""
    label = np.repeat(np.arange(len(most)), most)
    place = np.arange(most.sum()) - np.repeat(np.cumsum(most) - most, most)
    lowest = np.lexsort((rng.permutation(len(label)), place))[:slots]
    return np.bincount(label[lowest], minlength=len(most))


def _holders(quotas: np.ndarray, clients: int, rng: np.random.Generator) -> np.ndarray:
    """Which client holds which label, ``[N, classes]``: equally many labels each, ``quotas[c]`` holders of label ``c``."""
    holds = np.zeros((clients, len(quotas)), bool)
    left, each = quotas.copy(), quotas.sum() // clients
    for client in rng.permutation(clients):
        # The labels with most holders still to find go first: this always works out (Gale and Ryser).
        chosen = np.lexsort((rng.random(len(left)), -left))[:each]
        holds[client, chosen] = True
        left[chosen] -= 1
    return holds
