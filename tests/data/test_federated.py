"""The container against plain loops over clients."""

from collections import Counter

import jax.numpy as jnp
import numpy as np
import pytest

from jaxfed.data import FederatedData

IDS = {
    "integers": np.array([7, 3, 7, 7, 3, 11, 3, 7]),
    "strings": np.array(["kim", "ada", "kim", "kim", "ada", "zoe", "ada", "kim"]),
    "objects": np.array(["kim", "ada", "kim", "kim", "ada", "zoe", "ada", "kim"], dtype=object),
}


def random_data(examples=200, clients=9, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, clients, examples)
    x = rng.normal(size=(examples, 3)).astype(np.float32)
    return FederatedData.from_arrays({"x": x, "row": np.arange(examples), "y": rng.integers(0, 4, examples)}, ids), ids


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_each_client_has_its_rows_in_their_order(ids):
    x, y = np.arange(24).reshape(8, 3), np.arange(8)
    data = FederatedData.from_arrays({"x": x, "y": y}, ids)
    for i, name in enumerate(sorted(set(ids.tolist()))):
        np.testing.assert_array_equal(data.client(i)["x"], x[ids == name])
        np.testing.assert_array_equal(data.client(i)["y"], y[ids == name])
        assert data.client_names[i] == name


def test_sizes_and_offsets():
    data = FederatedData.from_arrays({"y": np.arange(8)}, IDS["integers"])
    assert (data.num_clients, data.num_examples, data.max_size) == (3, 8, 4)
    np.testing.assert_array_equal(data.sizes, [3, 4, 1])
    np.testing.assert_array_equal(data.offsets, [0, 3, 7, 8])
    np.testing.assert_array_equal(data.client_of_row, [0, 0, 0, 1, 1, 1, 1, 2])


def test_clients_without_rows():
    data = FederatedData.from_arrays({"y": [5, 6, 7]}, [3, 1, 3], num_clients=6)
    np.testing.assert_array_equal(data.sizes, [0, 1, 0, 2, 0, 0])
    np.testing.assert_array_equal(data.client_names, np.arange(6))
    assert data.client(5)["y"].shape == (0,)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8", "uint8", "bool", "complex64"])
def test_dtypes_are_kept(dtype):
    x = np.asarray(jnp.array([[0], [1], [1]], dtype))
    data = FederatedData.from_arrays({"x": x}, [1, 0, 1])
    assert data.arrays["x"].dtype == x.dtype
    np.testing.assert_array_equal(np.abs(data.arrays["x"]).astype(np.float32), [[1], [0], [1]])


@pytest.mark.parametrize("array", [[1, 2], jnp.array([1, 2]), np.ma.masked_array([1, 2]), range(1, 3)])
def test_whatever_numpy_reads_is_taken(array):
    np.testing.assert_array_equal(FederatedData.from_arrays({"y": array}, jnp.array([0, 1])).arrays["y"], [1, 2])


def test_nothing_can_be_changed():
    source = np.arange(3.0)
    data = FederatedData.from_arrays({"x": source}, [0, 0, 1])
    source[:] = 9
    data.arrays["x2"] = source
    assert data.arrays.keys() == {"x"}
    for array in (data.arrays["x"], data.client(0)["x"], data.offsets, data.client_names):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 5
    np.testing.assert_array_equal(data.arrays["x"], [0, 1, 2])
    with pytest.raises(AttributeError):
        data.arrays = {}


def test_select_keeps_order_and_names():
    data, ids = random_data()
    chosen = data.select([6, 0, 3])
    np.testing.assert_array_equal(chosen.client_names, [6, 0, 3])
    expected = np.concatenate([np.flatnonzero(ids == i) for i in (6, 0, 3)])
    np.testing.assert_array_equal(chosen.arrays["row"], expected)
    np.testing.assert_array_equal(chosen.client(1)["x"], data.client(0)["x"])


def test_select_passes_empty_clients():
    data = FederatedData.from_arrays({"y": [5, 6, 7]}, [3, 1, 3], num_clients=5)
    chosen = data.select([4, 3, 0, 1])
    np.testing.assert_array_equal(chosen.sizes, [0, 2, 0, 1])
    np.testing.assert_array_equal(chosen.arrays["y"], [5, 7, 6])


def test_map_sees_whole_arrays():
    data, _ = random_data()
    mapped = data.map(lambda rows: {"double": 2 * rows["x"], "y": rows["y"]})
    assert mapped.arrays.keys() == {"double", "y"}
    np.testing.assert_array_equal(mapped.client(4)["double"], 2 * data.client(4)["x"])


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
def test_split_deals_every_row_once_by_the_rule(fraction):
    data, _ = random_data()
    train, test = data.split(fraction, seed=3)
    for i in range(data.num_clients):
        rows = [half.client(i)["row"].tolist() for half in (train, test)]
        assert sorted(rows[0] + rows[1]) == data.client(i)["row"].tolist()
        assert rows[0] == sorted(rows[0])
        kept = max(1, int((100 - round(100 * fraction)) * data.sizes[i] // 100))
        assert len(rows[0]) == kept
    np.testing.assert_array_equal(train.client_names, test.client_names)


def test_split_follows_the_seed():
    data, _ = random_data()
    first, again, other = (data.split(0.3, seed=s)[1].arrays["row"].tolist() for s in (1, 1, 2))
    assert first == again != other


def test_split_takes_each_row_equally_often():
    data = FederatedData.from_arrays({"row": np.arange(20)}, np.repeat([0, 1], 10))
    times = sum(np.bincount(data.split(0.3, seed=s)[1].arrays["row"], minlength=20) for s in range(1000))
    # Binomial(1000, 0.3): mean 300, standard deviation 14.5.
    assert (np.abs(times - 300) < 5 * 14.5).all()
    # Rows that are drawn without replacement spread with 14.5 too: neither fixed nor overdispersed.
    assert 5 < times.std() < 25


def test_clients_are_split_independently():
    data = FederatedData.from_arrays({"place": np.tile(np.arange(10), 50)}, np.repeat(np.arange(50), 10))
    held = {tuple(data.split(0.3, seed=0)[1].client(i)["place"]) for i in range(50)}
    assert len(held) > 30


def test_one_row_stays_for_training_and_an_empty_client_stays_empty():
    data = FederatedData.from_arrays({"y": [5, 6, 7]}, [0, 2, 2], num_clients=4)
    train, test = data.split(0.9, seed=0)
    np.testing.assert_array_equal(train.sizes, [1, 0, 1, 0])
    np.testing.assert_array_equal(test.sizes, [0, 0, 1, 0])


def test_an_empty_half_is_still_a_container():
    train, test = FederatedData.from_arrays({"y": [5, 6]}, [0, 1]).split(0.5, seed=0)
    assert (train.num_examples, test.num_examples, test.num_clients) == (2, 0, 2)
    assert test.map(lambda rows: {"y": rows["y"] + 1}).arrays["y"].shape == (0,)
    assert repr(test) == "FederatedData(clients=2, examples=0, sizes=0/0/0, y: int64[])"
    np.testing.assert_array_equal(test.label_counts(classes=7), np.zeros((2, 7)))


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64])
def test_split_by_a_key(dtype):
    data, ids = random_data()
    held = np.random.default_rng(1).random(len(ids)) < 0.3
    flagged = FederatedData.from_arrays({"row": np.arange(len(ids)), "held": held.astype(dtype)}, ids)
    train, test = flagged.split_by("held")
    assert train.arrays.keys() == test.arrays.keys() == {"row"}
    for i in range(data.num_clients):
        np.testing.assert_array_equal(test.client(i)["row"], np.flatnonzero((ids == i) & held))
        np.testing.assert_array_equal(train.client(i)["row"], np.flatnonzero((ids == i) & ~held))


def test_split_by_a_mask_in_the_containers_order():
    data, _ = random_data()
    train, test = data.split_by(data.arrays["y"] == 3)
    assert set(test.arrays["y"]) == {3}
    assert set(train.arrays["y"]) == {0, 1, 2}
    assert test.num_clients == train.num_clients == data.num_clients


@pytest.mark.parametrize(("fraction", "unseen"), [(0.01, 1), (1 / 3, 3), (0.99, 8)])
def test_holdout_clients(fraction, unseen):
    data, _ = random_data()
    kept, held = data.holdout_clients(fraction, seed=0)
    assert held.num_clients == unseen
    assert sorted([*kept.client_names, *held.client_names]) == list(range(9))
    name = held.client_names[0]
    np.testing.assert_array_equal(held.client(0)["row"], data.client(name)["row"])


def test_every_client_is_held_out_equally_often():
    data, _ = random_data()
    times = Counter(name for s in range(900) for name in data.holdout_clients(1 / 3, seed=s)[1].client_names.tolist())
    # Binomial(900, 1/3): mean 300, standard deviation 14.1.
    assert all(abs(times[i] - 300) < 71 for i in range(9))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, bool])
def test_label_counts(dtype):
    data, _ = random_data()
    data = data.map(lambda rows: {"label": (rows["y"] % 2).astype(dtype)})
    counts = data.label_counts("label", classes=3)
    for i in range(data.num_clients):
        seen = Counter(data.client(i)["label"].astype(int).tolist())
        assert counts[i].tolist() == [seen[0], seen[1], 0]


def test_repr_is_one_line():
    arrays = {"x": np.zeros((4, 8, 8), np.float32), "y": np.zeros(4, np.uint8)}
    data = FederatedData.from_arrays(arrays, [0, 1, 1, 1])
    assert repr(data) == "FederatedData(clients=2, examples=4, sizes=1/2/3, x: float32[8, 8], y: uint8[])"


NAN = np.ones((4, 2, 2), np.float32)
NAN[2, 1, 0] = np.nan
HALF_NAN = np.asarray(jnp.array([1, jnp.nan, 1, 1], jnp.bfloat16))
GOOD = [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("arrays", "ids", "error", "text"),
    [
        ({}, GOOD, ValueError, "arrays is empty"),
        ([1, 2, 3, 4], GOOD, TypeError, "expected Mapping"),
        ({0: [1, 2, 3, 4]}, GOOD, TypeError, "expected str, got 0"),
        ({"x": [1, 2, 3]}, GOOD, ValueError, r"'x' has shape \(3,\), but client_ids has 4 rows"),
        ({"x": 3}, GOOD, ValueError, r"'x' has shape \(\)"),
        ({"x": [[1], [2, 3], [4], [5]]}, GOOD, ValueError, "'x' is not one array"),
        ({"x": NAN}, GOOD, ValueError, "'x' holds NaN, first in row 2"),
        ({"x": HALF_NAN}, GOOD, ValueError, "'x' holds NaN, first in row 1"),
        ({"x": np.ma.masked_equal([1, 2, 3, 4], 2)}, GOOD, ValueError, "'x' has masked values"),
        ({"x": np.array([1, "a", None, 2], object)}, GOOD, TypeError, "'x' has dtype object"),
        ({"x": ["a", "b", "c", "d"]}, GOOD, TypeError, "'x' has dtype <U1"),
        ({"x": np.zeros(4, "datetime64[s]")}, GOOD, TypeError, "'x' has dtype datetime64"),
        ({"mask": [1, 1, 1, 1]}, GOOD, ValueError, "'mask' is reserved"),
        ({"x": []}, [], ValueError, "one example or more"),
        ({"x": [1, 2]}, [[0], [1]], ValueError, r"1-D .* got \(2, 1\)"),
        ({"x": [1, 2]}, [0.0, 1.0], TypeError, "got float64"),
        ({"x": [1, 2]}, [True, False], TypeError, "got bool"),
        ({"x": [1, 2]}, [b"a", b"b"], TypeError, "client_ids must be integers or strings"),
        ({"x": [1, 2]}, np.array(["a", None]), TypeError, "got object"),
        ({"x": [1, 2]}, [0, -3], ValueError, "got -3 in row 1"),
    ],
)
def test_bad_arrays_are_refused(arrays, ids, error, text):
    with pytest.raises(error, match=text):
        FederatedData.from_arrays(arrays, ids)


@pytest.mark.parametrize(
    ("ids", "num_clients", "error", "text"),
    [
        ([0, 3], 3, ValueError, "at least 4, got 3"),
        ([0, 3], "4", TypeError, "expected an integer"),
        (["a", "b"], 2, TypeError, "needs integer client_ids"),
    ],
)
def test_bad_numbers_of_clients_are_refused(ids, num_clients, error, text):
    with pytest.raises(error, match=text):
        FederatedData.from_arrays({"y": [1, 2]}, ids, num_clients=num_clients)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda d: d.client(3), ValueError, r"3 is outside 0\.\.2"),
        (lambda d: d.client(-1), ValueError, "-1 is outside"),
        (lambda d: d.client(1.0), TypeError, "must be integers, got float64"),
        (lambda d: d.select([]), ValueError, "one or more"),
        (lambda d: d.select(1), ValueError, "1-D"),
        (lambda d: d.select([0, 2, 0]), ValueError, "0 is given 2 times"),
        (lambda d: d.select([0, 5]), ValueError, "5 is outside"),
        (lambda d: d.select([True, False, True]), TypeError, "flatnonzero"),
        (lambda d: d.map(lambda rows: {"y": rows["y"][:2]}), ValueError, "but the data has 8 rows"),
        (lambda d: d.map(lambda rows: rows["y"]), TypeError, "expected Mapping"),
        (lambda d: d.split(0, seed=0), ValueError, "above 0 and below 1, got 0"),
        (lambda d: d.split(1.0, seed=0), ValueError, "below 1, got 1.0"),
        (lambda d: d.split(float("nan"), seed=0), ValueError, "finite"),
        (lambda d: d.split([0.1, 0.2], seed=0), TypeError, "expected one number"),
        (lambda d: d.split(0.5, seed=None), TypeError, "split.seed: expected an integer"),
        (lambda d: d.split(0.5, seed=-1), ValueError, "at least 0"),
        (lambda d: d.split_by("z"), ValueError, "No array is called 'z'"),
        (lambda d: d.split_by("y"), ValueError, r"must hold 0 \(train\) and 1 \(test\), got 4"),
        (lambda d: d.split_by("x"), ValueError, "got float64"),
        (lambda d: d.split_by([True]), ValueError, r"of shape \(8,\), got bool of shape \(1,\)"),
        (lambda d: d.split_by(np.zeros(8, int)), ValueError, "must be bools"),
        (lambda d: d.map(lambda r: {"t": r["y"] > 2}).split_by("t"), ValueError, "only array"),
        (lambda d: d.select([0]).holdout_clients(0.5, seed=0), ValueError, "2 clients or more"),
        (lambda d: d.label_counts("x"), ValueError, "one integer from 0"),
        (lambda d: d.label_counts("z"), ValueError, "Known: x, y"),
        (lambda d: d.label_counts(classes=3), ValueError, "at least 8, got 3"),
        (lambda d: d.map(lambda r: {"y": r["y"] - 1}).label_counts(), ValueError, "from 0"),
    ],
)
def test_bad_calls_are_refused(call, error, text):
    data = FederatedData.from_arrays({"x": np.zeros(8), "y": np.arange(8)}, IDS["integers"])
    with pytest.raises(error, match=text):
        call(data)
