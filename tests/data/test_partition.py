"""Partitions: laws that hold for all, then each against its own definition."""

import heapq
import itertools
import time

import numpy as np
import pytest

from jaxfed.data import FederatedData
from jaxfed.data.partition import (
    PARTITIONS,
    _even_quotas,
    _repair,
    by_similarity,
    dirichlet_by_client,
    dirichlet_by_label,
    iid,
    lognormal_sizes,
    natural,
    partition,
    pathological,
    quantity_skew,
    shards,
)

DEALT = [
    ("iid", {}),
    ("dirichlet", {"alpha": 0.05}),
    ("dirichlet", {"alpha": 5.0, "min_size": 20}),
    ("dirichlet-by-client", {"alpha": 0.05}),
    ("dirichlet-by-client", {"alpha": 5.0}),
    ("shards", {"shards_per_client": 3}),
    ("pathological", {"labels_per_client": 2}),
    ("similarity", {"similarity": 0.1}),
    ("quantity-skew", {"alpha": 0.1}),
    ("lognormal-sizes", {"sigma": 3.0, "min_size": 3}),
]
COUNTS = [500, 1, 120, 7, 333, 61, 20, 2, 90, 66]
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), COUNTS))
every_partition = pytest.mark.parametrize(("name", "options"), DEALT, ids=[f"{n}{i}" for i, (n, _) in enumerate(DEALT)])


def table(labels, ids):
    """How many examples of each label each client has, by a plain loop."""
    counts = np.zeros((max(ids) + 1, max(labels) + 1), int)
    for label, client in zip(labels, ids):
        counts[client, label] += 1
    return counts


@every_partition
@pytest.mark.parametrize("clients", [1, 7, 40])
def test_every_example_goes_to_one_client_and_nobody_is_empty(name, options, clients):
    if name == "pathological" and clients == 1:
        options = {"labels_per_client": 10}
    ids = partition(name, LABELS, clients=clients, seed=0, **options)
    assert ids.shape == LABELS.shape
    assert ids.dtype.kind == "i"
    assert set(ids) == set(range(clients))
    assert min(np.bincount(ids)) >= options.get("min_size", 1)
    data = FederatedData.from_arrays({"row": np.arange(len(LABELS))}, ids)
    np.testing.assert_array_equal(np.sort(data.arrays["row"]), np.arange(len(LABELS)))


@every_partition
def test_the_seed_decides(name, options):
    first, again, other = (partition(name, LABELS, clients=20, seed=s, **options) for s in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@every_partition
def test_names_of_labels_do_not_matter(name, options):
    words = np.array([f"label {label}" for label in LABELS])
    first, second = (partition(name, labels, clients=20, seed=5, **options) for labels in (LABELS, words))
    np.testing.assert_array_equal(first, second)


@every_partition
def test_global_random_state_is_left_alone(name, options):
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    partition(name, LABELS, clients=20, seed=5, **options)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("alpha", [1e-12, 0.01, 1e12])
def test_extreme_skew_over_1000_clients_takes_no_time(alpha):
    labels = np.arange(20_000) % 10
    begin = time.perf_counter()
    for name in ("dirichlet", "dirichlet-by-client", "quantity-skew"):
        assert min(np.bincount(partition(name, labels, clients=1000, alpha=alpha, seed=0), minlength=1000)) >= 1
    assert time.perf_counter() - begin < 10


def test_as_many_clients_as_examples():
    labels = np.arange(50) % 5
    for name, options in DEALT[:2] + DEALT[3:5]:
        ids = partition(name, labels, clients=50, seed=0, **options)
        assert sorted(ids) == list(range(50))


# ---- iid


def test_iid_sizes_differ_by_one_at_most():
    sizes = np.bincount(iid(103, clients=10, seed=0))
    assert sorted(sizes) == [10] * 7 + [11] * 3


def test_iid_labels_are_hypergeometric():
    labels = np.arange(2000) % 2
    ones = [labels[iid(labels, clients=20, seed=s) == 3].sum() for s in range(400)]
    # 100 of 2000 without replacement, half of them ones: mean 50, variance 100/4 * 1900/1999.
    assert abs(np.mean(ones) - 50) < 5 * np.sqrt(23.8 / 400)
    assert 0.7 < np.var(ones) / 23.8 < 1.35


# ---- Dirichlet


def dirichlet_variance(alpha, parts):
    """Variance of one part of a symmetric Dirichlet: a (a0 - a) / (a0^2 (a0 + 1))."""
    total = alpha * parts
    return alpha * (total - alpha) / (total**2 * (total + 1))


def share_variance_by_label(alpha, clients=10, classes=300, each=400):
    labels = np.repeat(np.arange(classes), each)
    shares = table(labels, dirichlet_by_label(labels, clients=clients, alpha=alpha, seed=1)).T / each
    np.testing.assert_allclose(shares.sum(1), 1)
    return np.mean((shares - 1 / clients) ** 2)


def share_variance_by_client(alpha, clients=400, classes=5, each=500):
    labels = np.repeat(np.arange(classes), clients * each // classes)
    shares = table(labels, dirichlet_by_client(labels, clients=clients, alpha=alpha, seed=1)) / each
    np.testing.assert_allclose(shares.sum(1), 1)
    variance = np.mean((shares - 1 / classes) ** 2)
    # Drawing `each` labels by these shares adds E[q (1 - q)] / each.
    return variance - (np.mean(shares) - np.mean(shares**2)) / each


@pytest.mark.parametrize(("measure", "parts"), [(share_variance_by_label, 10), (share_variance_by_client, 5)])
@pytest.mark.parametrize("alpha", [0.3, 1.0, 3.0])
def test_shares_vary_as_a_dirichlet_says(measure, parts, alpha):
    measured = measure(alpha)
    assert 0.8 < measured / dirichlet_variance(alpha, parts) < 1.2
    for wrong in (alpha / 2, alpha * 2):
        assert not 0.8 < measured / dirichlet_variance(wrong, parts) < 1.2


@pytest.mark.parametrize("name", ["dirichlet", "dirichlet-by-client"])
def test_no_client_is_favoured(name):
    labels = np.arange(600) % 3
    shares = [table(labels, partition(name, labels, clients=6, alpha=0.5, seed=s))[:, 0] / 200 for s in range(400)]
    error = np.std(shares) / np.sqrt(400)
    assert np.abs(np.mean(shares, axis=0) - 1 / 6).max() < 5 * error


def test_by_label_rounds_to_within_one_example():
    labels = np.zeros(1000, int)
    rng = np.random.default_rng(7)
    rng.permutation(1000)  # the rows are shuffled first
    shares = rng.dirichlet(np.full(8, 3.0))
    sizes = np.bincount(dirichlet_by_label(labels, clients=8, alpha=3.0, seed=7))
    assert np.abs(sizes - 1000 * shares).max() <= 1


def test_by_client_sizes_are_equal_and_labels_run_out():
    ids = dirichlet_by_client(LABELS, clients=17, alpha=0.1, seed=0)
    assert set(np.bincount(ids)) == {len(LABELS) // 17, len(LABELS) // 17 + 1}
    np.testing.assert_array_equal(table(LABELS, ids).sum(0), COUNTS)


def test_no_client_always_draws_last():
    labels = np.arange(400) % 4
    counts = [table(labels, dirichlet_by_client(labels, clients=4, alpha=1e6, seed=s))[:, 0] for s in range(600)]
    spread = np.std(counts, axis=0)
    # In a fixed order the last client, which gets what is left, would spread sqrt(3) times as much as the first.
    assert spread.max() / spread.min() < 1.3


def test_small_alpha_is_one_label_and_large_alpha_is_iid():
    labels = np.repeat(np.arange(4), 1000)
    few, many = (table(labels, dirichlet_by_client(labels, clients=40, alpha=a, seed=0)) for a in (1e-3, 1e6))
    assert np.median(few.max(1)) == 100
    # Multinomial(100, 1/4) has standard deviation 4.3; the clients that draw last add a little.
    assert 3 < (many - 25).std() < 7


# ---- repair


def repaired_sizes(sizes, min_size):
    """Takes one example after the other from the client that is largest by then."""
    heap = [(-size, i) for i, size in enumerate(sizes)]
    heapq.heapify(heap)
    for _ in range(sum(max(min_size - size, 0) for size in sizes)):
        size, i = heapq.heappop(heap)
        heapq.heappush(heap, (size + 1, i))
    given = [-size for size, _ in sorted(heap, key=lambda pair: pair[1])]
    return [max(size, min_size) for size in given]


@pytest.mark.parametrize("sizes", [[9, 0, 0, 1, 14], [0, 0, 30], [4, 4, 4], [2, 7, 7, 0], [5, 5, 5, 0, 0, 0]])
@pytest.mark.parametrize("min_size", [1, 2])
def test_repair_takes_from_the_largest(sizes, min_size):
    ids = np.repeat(np.arange(len(sizes)), sizes)
    moved = _repair(ids.copy(), len(sizes), min_size, np.random.default_rng(0))
    assert sorted(np.bincount(moved)) == sorted(repaired_sizes(sizes, min_size))
    assert (moved != ids).sum() == sum(max(min_size - size, 0) for size in sizes)


# ---- shards


def test_shards_are_runs_of_the_sorted_examples():
    ids = shards(LABELS, clients=13, shards_per_client=3, seed=2)
    in_order = ids[np.argsort(LABELS, kind="stable")]
    cuts = np.array_split(np.arange(len(LABELS)), 39)
    lengths = sorted(len(cut) for cut in cuts)
    starts = np.arange(40) * len(LABELS) / 39
    owners = [set(in_order[int(np.ceil(a)) : int(np.ceil(b))]) for a, b in itertools.pairwise(starts)]
    assert all(len(owner) == 1 for owner in owners)
    assert np.bincount([*map(min, owners)]).tolist() == [3] * 13
    assert lengths[0] * 3 <= min(np.bincount(ids)) <= max(np.bincount(ids)) <= lengths[-1] * 3


def test_mcmahans_split_of_mnist():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 6000))
    counts = table(labels, shards(labels, clients=100, seed=0))
    assert (counts.sum(1) == 600).all()
    assert set((counts > 0).sum(1)) <= {1, 2}
    assert set(counts.ravel()) <= {0, 300, 600}


def test_shards_are_dealt_at_random():
    labels = np.repeat(np.arange(4), 10)
    met = [len(set(labels[shards(labels, clients=2, seed=s) == 0])) for s in range(20)]
    pairs = {tuple(sorted(set(labels[shards(labels, clients=2, seed=s) == 0]))) for s in range(60)}
    assert met == [2] * 20
    assert len(pairs) == 6


# ---- pathological


@pytest.mark.parametrize(("clients", "each"), [(100, 2), (10, 1), (7, 3), (5, 10), (33, 9), (4, 3)])
def test_exactly_k_labels_each_and_every_label_held(clients, each):
    labels = np.arange(3300) % 10
    holds = table(labels, pathological(labels, clients=clients, labels_per_client=each, seed=1)) > 0
    assert (holds.sum(1) == each).all()
    assert set(holds.sum(0)) <= {clients * each // 10, -(-clients * each // 10)}
    assert (holds.sum(0) >= 1).all()


def test_holders_share_a_label_equally():
    labels = np.arange(1003) % 5
    counts = table(labels, pathological(labels, clients=10, labels_per_client=2, seed=1))
    for column in counts.T:
        held = column[column > 0]
        assert held.max() - held.min() <= 1


def test_rare_labels_have_as_many_holders_as_examples():
    counts = table(LABELS, pathological(LABELS, clients=40, labels_per_client=2, seed=0))
    assert ((counts > 0).sum(1) == 2).all()
    assert (counts > 0).sum(0)[[1, 3, 7]].tolist() == [1, 7, 2]
    np.testing.assert_array_equal(counts.sum(0), COUNTS)


def test_all_pairs_of_labels_occur():
    labels = np.arange(2000) % 4
    counts = table(labels, pathological(labels, clients=200, labels_per_client=2, seed=0))
    pairs, times = np.unique(counts > 0, axis=0, return_counts=True)
    assert len(pairs) == 6
    assert times.min() > 10


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9, 1.0])
def test_a_share_is_alike_and_the_rest_is_runs_of_the_sorted_examples(share):
    """10 labels of 600 over 20 clients: half a label each, and of the share 30 times as much of every label on average."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 600))
    counts = table(labels, by_similarity(labels, clients=20, similarity=share, seed=1))
    np.testing.assert_array_equal(counts.sum(1), 300)
    own = np.arange(20) // 2
    foreign = counts.sum() - counts[np.arange(20), own].sum()
    # Of what is dealt at random nine tenths are of other labels; sorted pieces are of one, up to what chance took of each label.
    assert abs(foreign / 6000 - 0.9 * share) < 0.03


def test_similar_sizes_differ_by_one_at_most():
    for share in (0.0, 0.37, 1.0):
        sizes = np.bincount(by_similarity(LABELS, clients=7, similarity=share, seed=0), minlength=7)
        assert np.ptp(sizes) <= 1


@pytest.mark.parametrize(("most", "slots"), [([5, 5, 5], 9), ([1, 9, 9], 9), ([2, 2, 9], 12), ([3, 3, 3], 9)])
def test_quotas_are_even_where_they_can_be(most, slots):
    quotas = _even_quotas(np.array(most), slots, np.random.default_rng(0))
    assert quotas.sum() == slots
    assert (quotas <= most).all()
    free = quotas[quotas < most]
    assert len(free) == 0 or quotas.max() - free.min() <= 1


# ---- sizes


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_sizes_vary_as_a_dirichlet_says(alpha):
    draws = [np.bincount(quantity_skew(5000, clients=10, alpha=alpha, seed=s), minlength=10) for s in range(150)]
    measured = np.mean((np.array(draws) / 5000 - 0.1) ** 2)
    assert 0.8 < measured / dirichlet_variance(alpha, 10) < 1.2
    for wrong in (alpha / 2, alpha * 2):
        assert not 0.8 < measured / dirichlet_variance(wrong, 10) < 1.2


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_logarithms_of_sizes_spread_with_sigma(sigma):
    sizes = np.bincount(lognormal_sizes(1_000_000, clients=500, sigma=sigma, seed=0))
    # The standard error of a standard deviation of 500 draws is 3.2%.
    assert 0.85 < np.log(sizes).std() / sigma < 1.15


def test_sigma_zero_is_equal_sizes():
    assert set(np.bincount(lognormal_sizes(100, clients=10, sigma=0, seed=0))) == {10}


@pytest.mark.parametrize(("function", "option"), [(quantity_skew, {"alpha": 1.0}), (lognormal_sizes, {"sigma": 1.0})])
def test_only_sizes_are_skewed(function, option):
    labels = np.arange(40_000) % 2
    counts = table(labels, function(labels, clients=20, seed=0, **option))
    sizes = counts.sum(1)
    scores = (counts[:, 0] - sizes / 2) / np.sqrt(sizes / 4 * (1 - sizes / 40_000))
    assert np.abs(scores).max() < 4.5
    assert 0.3 < np.mean(scores**2) < 2.2


def test_natural_numbers_the_clients():
    np.testing.assert_array_equal(natural([30, 7, 30, 12]), [2, 0, 2, 1])
    np.testing.assert_array_equal(natural(np.array(["b", "a", "b"], object)), [1, 0, 1])


# ---- refusals

Y = [0, 1, 2] * 4


@pytest.mark.parametrize(
    ("name", "labels", "options", "error", "text"),
    [
        ("dirichlt", Y, {}, ValueError, "No partition is called 'dirichlt'. Did you mean 'dirichlet'"),
        ("iid", Y, {"clients": 2, "sed": 1}, ValueError, "no option 'sed'. Did you mean 'seed'"),
        ("iid", Y, {"clients": 2}, ValueError, "needs 'seed'. It accepts: clients, seed"),
        ("natural", Y, {"seed": 0}, ValueError, "no option 'seed'.* accepts: no options"),
        ("iid", Y, {"clients": 13, "seed": 0}, ValueError, "need 13, got 12 examples"),
        ("iid", Y, {"clients": 0, "seed": 0}, ValueError, "iid.clients: .* at least 1, got 0"),
        ("iid", Y, {"clients": 2.5, "seed": 0}, TypeError, "iid.clients: expected an integer"),
        ("iid", Y, {"clients": True, "seed": 0}, TypeError, "expected an integer"),
        ("iid", Y, {"clients": 2, "seed": None}, TypeError, "iid.seed: expected an integer"),
        ("iid", Y, {"clients": 2, "seed": -1}, ValueError, "iid.seed: .* at least 0"),
        ("iid", 0, {"clients": 2, "seed": 0}, ValueError, "number of examples: .* at least 1"),
        ("iid", [], {"clients": 2, "seed": 0}, ValueError, "one label per example"),
        ("iid", [[1, 2]], {"clients": 2, "seed": 0}, ValueError, r"got shape \(1, 2\)"),
        ("iid", [1.0, 2.0], {"clients": 2, "seed": 0}, TypeError, "got float64"),
        ("natural", np.array([1, None]), {}, TypeError, "got object"),
        ("dirichlet", Y, {"clients": 2, "alpha": 0, "seed": 0}, ValueError, "dirichlet_by_label.alpha: .* above 0"),
        ("dirichlet", Y, {"clients": 2, "alpha": -1.0, "seed": 0}, ValueError, "got -1.0"),
        ("dirichlet", Y, {"clients": 2, "alpha": float("nan"), "seed": 0}, ValueError, "finite"),
        ("dirichlet", Y, {"clients": 2, "alpha": [1, 2], "seed": 0}, TypeError, "expected one number"),
        ("dirichlet", Y, {"clients": 4, "alpha": 1, "min_size": 4, "seed": 0}, ValueError, "need 16, got 12"),
        ("dirichlet", Y, {"clients": 4, "alpha": 1, "min_size": 0, "seed": 0}, ValueError, "min_size: .* at least 1"),
        ("dirichlet-by-client", Y, {"clients": 4, "alpha": 0, "seed": 0}, ValueError, "above 0"),
        ("quantity-skew", Y, {"clients": 4, "alpha": 0, "seed": 0}, ValueError, "above 0"),
        ("similarity", Y, {"clients": 4, "similarity": 1.5, "seed": 0}, ValueError, "at most 1"),
        ("lognormal-sizes", Y, {"clients": 4, "sigma": -1, "seed": 0}, ValueError, "at least 0"),
        ("shards", Y, {"clients": 4, "shards_per_client": 4, "seed": 0}, ValueError, "need 16, got 12"),
        ("shards", Y, {"clients": 4, "shards_per_client": 0, "seed": 0}, ValueError, "at least 1"),
        ("pathological", Y, {"clients": 4, "labels_per_client": 4, "seed": 0}, ValueError, "there are 3 labels"),
        ("pathological", Y, {"clients": 2, "labels_per_client": 1, "seed": 0}, ValueError, "cannot hold all 3 labels"),
        ("pathological", Y, {"clients": 9, "labels_per_client": 2, "seed": 0}, ValueError, "18 pairs .* allow 12"),
        ("pathological", Y, {"clients": 4, "labels_per_client": 0, "seed": 0}, ValueError, "at least 1"),
    ],
)
def test_bad_input_is_refused(name, labels, options, error, text):
    with pytest.raises(error, match=text):
        partition(name, labels, **options)


def test_the_table_holds_the_known_names():
    known = {"iid", "dirichlet", "dirichlet-by-client", "shards", "pathological", "quantity-skew", "natural", "similarity"}
    assert known <= set(PARTITIONS)
    assert PARTITIONS["dirichlet"] is dirichlet_by_label
