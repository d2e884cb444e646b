"""Data sets against their recipes, files against what was written into them."""

import sys
import zipfile

import numpy as np
import pytest

from jaxfed.data import DATASETS, FederatedData, digits, linear_mixture, load, npz, npz_arrays, synthetic

# ---- digits


def test_digits_are_scikit_learns_images():
    datasets = pytest.importorskip("sklearn.datasets")
    bunch = datasets.load_digits()
    arrays = digits()
    np.testing.assert_allclose(arrays["x"].reshape(-1, 8, 8) * 16, bunch.images)
    np.testing.assert_array_equal(arrays["y"], bunch.target)
    assert (arrays["x"].min(), arrays["x"].max()) == (0, 1)


def test_digits_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "jaxfed\[run\]"'):
        digits()


# ---- synthetic


def recipe(alpha, beta, iid, seed, clients=30):
    """FedProx's recipe line by line: one client and one example at a time, with the full covariance."""
    rng = np.random.RandomState(seed)
    sizes = rng.lognormal(4, 2, clients).astype(int) + 50
    if iid:
        centers = np.zeros((clients, 60))
        shared = rng.normal(0, 1, (60, 10)), rng.normal(0, 1, 10)
    else:
        u = rng.normal(0, alpha, clients)
        b = rng.normal(0, beta, clients)
        centers = np.array([rng.normal(b[k], 1, 60) for k in range(clients)])
    covariance = np.diag([(j + 1) ** -1.2 for j in range(60)])
    for k in range(clients):
        weight, bias = shared if iid else (rng.normal(u[k], 1, (60, 10)), rng.normal(u[k], 1, 10))
        x = rng.multivariate_normal(centers[k], covariance, sizes[k])
        yield x, [int(np.argmax(row @ weight + bias)) for row in x]


@pytest.mark.parametrize(("alpha", "beta", "iid", "seed"), [(1, 1, False, 1), (0.5, 0, False, 2), (0, 0, True, 1)])
def test_synthetic_follows_the_recipe(alpha, beta, iid, seed):
    data = synthetic(alpha, beta, seed=seed, iid=iid)
    for k, (x, y) in enumerate(recipe(alpha, beta, iid, seed)):
        np.testing.assert_allclose(data.client(k)["x"], x, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(data.client(k)["y"], y)
    assert data.num_clients == 30


@pytest.mark.parametrize(("seed", "train_rows"), [(0, 20101), (1, 7799), (2, 8908)])
def test_synthetic_has_the_known_numbers_of_training_rows(seed, train_rows):
    train, test = synthetic(1, 1, seed=seed).split(0.1, seed=0)
    assert train.num_examples == train_rows
    assert (test.sizes >= 5).all()


def test_inputs_vary_as_the_power_of_their_place():
    data = synthetic(0, 0, seed=0)
    centered = [data.client(k)["x"] - data.client(k)["x"].mean(0) for k in range(30)]
    variance = np.concatenate(centered).var(0)
    np.testing.assert_allclose(variance * np.arange(1, 61) ** 1.2, 1, atol=0.08)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_beta_is_the_standard_deviation_between_clients(beta):
    data = synthetic(0, beta, clients=300, seed=0)
    centers = np.array([data.client(k)["x"].mean() for k in range(300)])
    # Each is the mean of 60 numbers N(B_k, 1).
    expected = np.sqrt(beta**2 + 1 / 60)
    assert 0.85 < centers.std() / expected < 1.15


def test_alpha_zero_and_beta_zero_is_not_iid():
    spread = {iid: synthetic(0, 0, seed=1, iid=iid).label_counts(classes=10) for iid in (False, True)}
    largest = {iid: np.mean(counts.max(1) / counts.sum(1)) for iid, counts in spread.items()}
    assert largest[False] > largest[True] + 0.1


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"alpha": -1}, ValueError, "synthetic.alpha: .* at least 0, got -1"),
        ({"beta": float("inf")}, ValueError, "synthetic.beta: expected a finite"),
        ({"alpha": "1"}, TypeError, "synthetic.alpha: expected a number"),
        ({"clients": 0}, ValueError, "synthetic.clients: .* at least 1"),
        ({"seed": None}, TypeError, "synthetic.seed"),
        ({"seed": 2**32}, ValueError, "synthetic.seed"),
        ({"iid": True}, ValueError, "alpha and beta must be 0, got 1.0, 1.0"),
    ],
)
def test_bad_recipes_are_refused(change, error, text):
    with pytest.raises(error, match=text):
        synthetic(**{"alpha": 1, "beta": 1, "seed": 0, **change})


# ---- linear_mixture


def label(x, j, counts, noises, theta, published):
    """FedEM's label of row j: its own component's, or the last one's that has so many rows."""
    ends = np.cumsum(counts)
    own = [m for m, count in enumerate(counts) if (j < count if published else ends[m] - count <= j < ends[m])]
    if not own:
        return 0
    m = own[-1]
    place = j if published else j - (ends[m] - counts[m])
    return int(np.round(1 / (1 + np.exp(-(x[j] @ theta[m] + noises[m][place])))))


def mixture_recipe(seed, published, clients, test_rows):
    """FedEM's recipe, one row at a time: ``(x, y)`` of each client's training and test rows."""
    rng = np.random.RandomState(seed)
    sizes = [min(int(draw) + 50, 1000) for draw in rng.lognormal(4, 2, clients)]
    proportions = [rng.dirichlet([0.4] * 3) for _ in range(clients)]
    theta = rng.uniform(-1, 1, size=(3, 150))
    for k in range(clients):
        for size in (sizes[k], test_rows):
            counts = rng.multinomial(size, proportions[k])
            x = rng.uniform(-1, 1, size=(size, 150))
            noises = [rng.normal(size=count, scale=0.1) for count in counts]
            y = np.array([label(x, j, counts, noises, theta, published) for j in range(size)])
            order = np.arange(size)
            rng.shuffle(order)
            yield x[order], y[order]


@pytest.mark.parametrize("published", [True, False])
def test_linear_mixture_follows_the_recipe(published):
    halves = linear_mixture(clients=6, test_rows=80, published_labels=published, seed=3).split_by("is_test")
    expected = mixture_recipe(3, published, clients=6, test_rows=80)
    for k in range(6):
        for half in halves:
            x, y = next(expected)
            np.testing.assert_allclose(half.client(k)["x"], x, rtol=1e-6)
            np.testing.assert_array_equal(half.client(k)["y"], y)


def test_published_labels_favour_zero():
    """A constant classifier is right on 63.2 % of the published labels, and on half of the mended ones."""
    shares = [np.mean(linear_mixture(test_rows=200, published_labels=p, seed=12345).arrays["y"] == 0) for p in (True, False)]
    np.testing.assert_allclose(shares, [0.632, 0.505], atol=0.01)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"clients": 0}, "linear_mixture.clients: .* at least 1"),
        ({"alpha": 0}, "linear_mixture.alpha: .* above 0"),
        ({"noise": -1}, "linear_mixture.noise: .* at least 0"),
        ({"test_rows": -1}, "linear_mixture.test_rows: .* at least 0"),
    ],
)
def test_bad_mixtures_are_refused(change, text):
    with pytest.raises(ValueError, match=text):
        linear_mixture(**{"seed": 0, **change})


# ---- npz


@pytest.fixture
def stored(tmp_path):
    path = tmp_path / "digits.npz"
    arrays = {"image": np.arange(12.0).reshape(6, 2), "y": np.arange(6), "test_y": np.arange(2), "names": ["a", "b"]}
    np.savez(path, client=["b", "a", "b", "c", "a", "b"], **arrays)
    return path


def test_npz_takes_what_has_one_row_per_id(stored):
    data = npz(stored)
    assert data.arrays.keys() == {"image", "y"}
    np.testing.assert_array_equal(data.client(1)["y"], [0, 2, 5])
    np.testing.assert_array_equal(data.client_names, ["a", "b", "c"])


@pytest.mark.parametrize(("keys", "taken"), [(["y"], {"y"}), ({"x": "image", "label": "y"}, {"x", "label"})])
def test_npz_takes_and_renames_what_is_asked_for(stored, keys, taken):
    assert npz(str(stored), keys=keys).arrays.keys() == npz_arrays(stored, keys=keys).keys() == taken


def test_npz_arrays_takes_all(stored):
    assert npz_arrays(stored).keys() == {"client", "image", "y", "test_y", "names"}


def test_unasked_arrays_are_not_read(tmp_path):
    np.savez(tmp_path / "f.npz", y=[1, 2], client=[0, 1], notes=np.array([{}, {}]))
    assert npz(tmp_path / "f.npz", keys=["y"]).num_clients == 2


def test_ids_may_be_a_feature_too(stored):
    ids = npz(stored, client_key="y", keys=["y"])
    np.testing.assert_array_equal(ids.arrays["y"], np.arange(6))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"client_key": "writer"}, ValueError, "has no array 'writer'.* It holds: client, image, y, test_y, names"),
        ({"keys": ["imag"]}, ValueError, "has no array 'imag'. Did you mean 'image'"),
        ({"keys": "image"}, TypeError, r'Write \["image"\]'),
        ({"keys": ["test_y"]}, ValueError, r"'test_y' has shape \(2,\), but client_ids has 6 rows"),
        ({"keys": []}, ValueError, "arrays is empty"),
        ({"client_key": "image"}, ValueError, "client_ids must be 1-D"),
    ],
)
def test_wrong_names_are_refused(stored, options, error, text):
    with pytest.raises(error, match=text):
        npz(stored, **options)


def write_object(path):
    np.savez(path, client=[0, 1], y=np.array([1, "a"], dtype=object))


def write_single_array(path):
    with open(path, "wb") as file:
        np.save(file, np.arange(3))


def write_cut_short(path):
    np.savez(path, client=[0, 1], y=[1, 2])
    path.write_bytes(path.read_bytes()[:-40])


def write_damaged(path):
    np.savez(path, client=np.zeros(500, int), y=np.zeros(500))
    damaged = bytearray(path.read_bytes())
    damaged[600] ^= 255
    path.write_bytes(damaged)


def write_other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("client", "text")


@pytest.mark.parametrize(
    ("write", "error", "text"),
    [
        (lambda path: None, FileNotFoundError, "There is no file .*bad.npz"),
        (lambda path: path.mkdir(), FileNotFoundError, "There is no file"),
        (lambda path: path.write_bytes(b""), ValueError, "no .npz file"),
        (lambda path: path.write_text("client,y\n0,1"), ValueError, "no .npz file"),
        (write_single_array, ValueError, "no .npz file"),
        (write_cut_short, ValueError, "cut short"),
        (write_object, ValueError, "array 'y' cannot be read: Object arrays"),
        (write_damaged, ValueError, "array 'client' cannot be read: Bad CRC"),
        (write_other_zip, ValueError, "'client' is not an array"),
    ],
)
def test_bad_files_are_refused(tmp_path, write, error, text):
    path = tmp_path / "bad.npz"
    write(path)
    with pytest.raises(error, match=text):
        npz(path)


# ---- by name


def test_load_deals_arrays_by_a_partition():
    data = load("digits", partition=("pathological", {"clients": 20, "labels_per_client": 2, "seed": 0}))
    assert isinstance(data, FederatedData)
    assert data.num_examples == 1797
    assert ((data.label_counts() > 0).sum(1) == 2).all()


def test_load_gives_a_federation_as_it_is():
    data, direct = load("synthetic", alpha=0.5, beta=0.5, seed=1), synthetic(0.5, 0.5, seed=1)
    np.testing.assert_array_equal(data.arrays["x"], direct.arrays["x"])


def test_load_reads_files_both_ways(stored):
    assert load("npz", path=stored).num_clients == 3
    keys = {"x": "image", "who": "client", "y": "y"}
    with pytest.raises(TypeError, match="'who' has dtype <U1"):
        load("npz", path=stored, keys=keys, partition=("iid", {"clients": 2, "seed": 0}))
    keys = ["image", "y"]
    assert load("npz", path=stored, keys=keys, partition=["iid", {"clients": 2, "seed": 0}]).num_clients == 2
    by_label = load("npz", path=stored, keys=keys, partition=("natural", {}), label_key="y")
    assert by_label.num_clients == 6


@pytest.mark.parametrize(
    ("name", "options", "error", "text"),
    [
        ("digit", {}, ValueError, "No data set is called 'digit'. Did you mean 'digits'"),
        ("digits", {}, ValueError, "has no clients of its own: give a partition, one of dirichlet, "),
        ("digits", {"partition": ("iid", {"seed": 0})}, ValueError, "partition 'iid' needs 'clients'"),
        ("digits", {"partition": ("iid", {"clients": 3, "seed": 0, "alpha": 1})}, ValueError, "no option 'alpha'"),
        ("digits", {"partition": ("id", {"clients": 3})}, ValueError, "No partition is called 'id'"),
        ("digits", {"partition": "iid"}, TypeError, "must be a name and its options, such as"),
        ("digits", {"partition": ("natural", {}), "label_key": "z"}, ValueError, "No array of 'digits' is called 'z'"),
        ("digits", {"partition": ("natural", {}), "scale": 1}, ValueError, "data set 'digits' has no option 'scale'"),
        ("synthetic", {"partition": ("iid", {})}, ValueError, "has its own clients: leave the partition out"),
        ("synthetic", {"alpha": 1, "seed": 0}, ValueError, "needs 'beta'. It accepts: alpha, beta, clients, seed"),
        ("synthetic", {"alpa": 1}, ValueError, "no option 'alpa'. Did you mean 'alpha'"),
        ("npz", {}, ValueError, "needs 'path'"),
        ("npz", {"path": "a", "partition": ("natural", {}), "client_key": "c"}, ValueError, "no option 'client_key'"),
    ],
)
def test_bad_requests_are_refused(name, options, error, text):
    with pytest.raises(error, match=text):
        load(name, **options)


def test_the_table_of_names():
    assert set(DATASETS) == {"digits", "synthetic", "linear-mixture", "npz", "stored"}
