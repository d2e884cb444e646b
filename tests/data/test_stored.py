"""Real federations: the readers and the generator against the data that others stored."""

from pathlib import Path

import numpy as np
import pytest

from jaxfed.data import FederatedData, npz, synthetic

STORED = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


def stored(name):
    path = STORED / name
    if not path.is_file():
        pytest.skip(f"{name} is not on this machine")
    return path


def fedprox(name):
    """The test rows of one of FedProx's own synthetic sets."""
    with np.load(stored(f"fedprox_synthetic/synthetic_{name}_test.npz")) as file:
        ids = np.repeat(np.arange(30), np.diff(file["offsets"]))
        return FederatedData.from_arrays({"x": file["x"], "y": file["y"]}, ids)


def within_variance(data):
    """Variance of each feature around its client's mean, pooled over clients."""
    squares = sum(((rows["x"] - rows["x"].mean(0)) ** 2).sum(0) for rows in map(data.client, range(data.num_clients)))
    return squares / (data.num_examples - data.num_clients)


@pytest.mark.parametrize(("name", "alpha"), [("iid", None), ("0_0", 0), ("0.5_0.5", 0.5), ("1_1", 1)])
def test_inputs_vary_alike_within_clients(name, alpha):
    theirs = within_variance(fedprox(name))
    ours = within_variance(synthetic(alpha or 0, alpha or 0, seed=0, iid=alpha is None))
    # About 870 degrees of freedom: a relative standard error of 4.8% for each of 60 features.
    np.testing.assert_allclose(theirs / ours, 1, atol=0.22)
    assert abs(np.mean(theirs / ours) - 1) < 0.03


@pytest.mark.parametrize(("name", "beta"), [("0_0", 0), ("0.5_0.5", 0.5), ("1_1", 1)])
def test_clients_are_apart_by_beta(name, beta):
    data = fedprox(name)
    centers = np.array([data.client(k)["x"].mean() for k in range(30)])
    # 30 clients: the standard error of a standard deviation is 13%.
    assert 0.6 < centers.std() / np.sqrt(beta**2 + 1 / 60) < 1.5


def test_sizes_are_distributed_alike():
    stats = pytest.importorskip("scipy.stats")
    theirs = np.concatenate([fedprox(name).sizes for name in ("iid", "0_0", "0.5_0.5", "1_1")])
    _, test = synthetic(0, 0, clients=300, seed=5).split(0.1, seed=0)
    assert stats.ks_2samp(theirs, test.sizes).pvalue > 0.01
    halved, doubled = (np.ceil((np.exp(4 + scale * (np.log(10 * test.sizes - 45) - 4)) + 50) / 10) for scale in (0.5, 2))
    assert stats.ks_2samp(theirs, halved).pvalue < 0.01
    assert stats.ks_2samp(theirs, doubled).pvalue < 0.01


def test_femnist_by_writer():
    path = stored("femnist_leaf/femnist_leaf155.npz")
    train, test = npz(path).split_by("is_test")
    assert (train.num_clients, train.num_examples, test.num_examples) == (155, 42_614, 4_808)
    sizes = train.sizes + test.sizes
    assert (sizes.min(), np.median(sizes), sizes.max()) == (6, 318, 443)
    assert repr(test).endswith("x: uint8[28, 28], y: uint8[])")
    assert train.label_counts(classes=62).sum() == 42_614


def test_leafs_own_split_has_the_sizes_of_ours():
    data = npz(stored("femnist_leaf/femnist_leaf155.npz"))
    np.testing.assert_array_equal(data.split(0.1, seed=0)[0].sizes, data.split_by("is_test")[0].sizes)


def test_mnist_by_writer():
    path = stored("mnist_writers/mnist_writers.npz")
    train = npz(path, client_key="writer_train", keys={"x": "x_train", "y": "y_train"})
    assert (train.num_clients, train.num_examples) == (539, 60_000)
    assert (train.sizes.min(), train.sizes.max()) == (19, 131)
    with np.load(path) as file:
        writer = train.client_names[77]
        np.testing.assert_array_equal(train.client(77)["y"], file["y_train"][file["writer_train"] == writer])
        np.testing.assert_array_equal(train.label_counts().sum(0), np.bincount(file["y_train"]))
