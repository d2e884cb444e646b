"""One process's share of a federation: what it holds, what it still knows of the others, what it reads of a file."""

import zipfile

import numpy as np
import pytest

from jaxfed.data import FederatedData, archives, load, load_shard

IDS = np.array(["b", "a", "d", "a", "b", "b", "e", "a", "d", "b", "c"])
ROWS = {"x": np.arange(22, dtype=np.float32).reshape(11, 2), "y": np.arange(11) % 4}


def federation():
    return FederatedData.from_arrays(ROWS, IDS)


def assert_same(left, right):
    np.testing.assert_array_equal(left.offsets, right.offsets)
    np.testing.assert_array_equal(left.client_names, right.client_names)
    assert left.held == right.held
    assert list(left.arrays) == list(right.arrays)
    for key, x in left.arrays.items():
        assert x.dtype == right.arrays[key].dtype
        np.testing.assert_array_equal(x, right.arrays[key])


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 7])
def test_shards_together_are_the_whole(num_shards):
    whole, shards = federation(), [federation().shard(num_shards, index) for index in range(num_shards)]
    assert [client for shard in shards for client in shard.held] == list(range(5))
    assert max(len(shard.held) for shard in shards) == -(-5 // num_shards)
    for key, rows in whole.arrays.items():
        np.testing.assert_array_equal(np.concatenate([shard.arrays[key] for shard in shards]), rows)
    for shard in shards:
        assert (shard.num_clients, shard.num_examples, shard.max_size) == (5, 11, 4)
        for client in shard.held:
            np.testing.assert_array_equal(shard.client(client)["x"], whole.client(client)["x"])


def test_a_shard_outlives_the_whole_and_its_changes():
    whole = federation()
    shard = whole.shard(2, 1)
    assert not any(np.shares_memory(shard.arrays[key], x) for key, x in whole.arrays.items())
    assert not shard.arrays["x"].flags.writeable


@pytest.mark.parametrize("index", range(3))
def test_a_split_of_a_shard_is_the_shard_of_a_split(index):
    for whole, own in zip(federation().split(0.4, seed=3), federation().shard(3, index).split(0.4, seed=3)):
        assert_same(own, whole.shard(3, index))
    mask = np.arange(11) % 2 == 0
    for whole, own in zip(federation().split_by(mask), federation().shard(3, index).split_by(mask)):
        assert_same(own, whole.shard(3, index))


def test_map_has_the_shard_s_rows():
    shard = federation().shard(3, 0).map(lambda rows: {"z": rows["x"][:, 0] + rows["y"]})
    assert_same(shard, federation().map(lambda rows: {"z": rows["x"][:, 0] + rows["y"]}).shard(3, 0))


@pytest.mark.parametrize(
    ("use", "text"),
    [
        (lambda data: data.select([0, 1]), "select needs the rows of all clients; of this shard only clients 2 to 3 are here"),
        (lambda data: data.shard(2, 0), "shard needs the rows of all"),
        (lambda data: data.label_counts(), "label_counts needs"),
        (lambda data: data.split_by("y"), "split_by with the array 'y' needs"),
        (lambda data: data.holdout_clients(0.5, seed=0), "select needs"),
        (lambda data: data.client(1), "Rows 3 to 6 are not all here: this shard has the rows of clients 2 to 3"),
        (lambda data: data.client(4), "Rows 10 to 10 are not all here: this shard has the rows of clients 2 to 3"),
    ],
)
def test_what_needs_others_rows_is_refused(use, text):
    with pytest.raises(ValueError, match=text):
        use(federation().shard(3, 1))


def test_a_shard_is_not_saved_as_the_whole(tmp_path):
    with pytest.raises(ValueError, match="save needs"):
        federation().shard(2, 0).save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("num_shards", "index", "error", "text"),
    [
        (2, 2, ValueError, "index: expected an integer at least 0 and below 2, got 2"),
        (2, -1, ValueError, "index"),
        (0, 0, ValueError, "num_shards"),
        (2, 0.5, TypeError, "index"),
        (2.5, 0, TypeError, "num_shards"),
    ],
)
def test_bad_shards_are_refused(num_shards, index, error, text):
    with pytest.raises(error, match=text):
        federation().shard(num_shards, index)
    with pytest.raises(error, match=text):
        FederatedData.from_reader(lambda rows: {"y": rows}, IDS, num_shards=num_shards, index=index)


# ---- reading


@pytest.mark.parametrize("num_shards", [1, 2, 3, 6])
def test_a_reader_is_asked_for_the_shard_s_rows_alone(num_shards):
    asked = []

    def read(rows):
        asked.append(rows)
        return {key: array[rows] for key, array in ROWS.items()}

    for index in range(num_shards):
        shard = FederatedData.from_reader(read, IDS, num_shards=num_shards, index=index)
        assert_same(shard, federation().shard(num_shards, index))
    assert all((np.diff(rows) > 0).all() for rows in asked)
    np.testing.assert_array_equal(np.sort(np.concatenate(asked)), np.arange(11))


def test_clients_without_rows_have_a_shard():
    read = {"y": np.array([5, 6, 7])}
    whole = FederatedData.from_arrays(read, [0, 2, 0], num_clients=6)
    for index in range(3):
        shard = FederatedData.from_reader(
            lambda rows: {"y": read["y"][rows]}, [0, 2, 0], num_clients=6, num_shards=3, index=index
        )
        assert_same(shard, whole.shard(3, index))


def test_what_a_reader_gives_is_checked():
    def first(read):
        return FederatedData.from_reader(read, IDS, num_shards=2, index=0)

    with pytest.raises(ValueError, match=r"shape \(11,\), but read was asked for 8 rows"):
        first(lambda rows: {"y": np.arange(11)})
    # The row's number in the file, not in the shard.
    with pytest.raises(ValueError, match="Array 'x' holds NaN, first in row 8"):
        FederatedData.from_reader(lambda rows: {"x": np.where(rows == 8, np.nan, 1.0)}, IDS, num_shards=2, index=1)


# ---- by name


@pytest.fixture
def archive(tmp_path):
    arrays = {
        **ROWS,
        "column": np.asfortranarray(np.arange(22).reshape(11, 2)),
        "none": np.zeros((11, 0)),
        "flag": np.arange(11) > 4,
        "swapped": np.arange(11, dtype=">i4"),
        "other": np.arange(3),
    }
    np.savez_compressed(tmp_path / "rows.npz", client=IDS, **arrays)
    return tmp_path / "rows.npz"


@pytest.mark.parametrize("piece", [1, 24, 2**20])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keys": {"image": "x", "label": "y"}},
        {"client_key": "y", "keys": ["x"]},
        {"keys": ["x", "y"], "partition": ("dirichlet", {"clients": 4, "alpha": 1.0, "seed": 0})},
        {"keys": {"x": "x", "label": "y"}, "label_key": "label", "partition": ("natural", {})},
    ],
)
def test_a_shard_of_an_archive_is_read_alone(archive, monkeypatch, piece, options):
    whole, read, wholly = load("npz", path=archive, **options), archives.Archive.read, []
    monkeypatch.setattr(archives, "_PIECE_BYTES", piece)
    monkeypatch.setattr(archives.Archive, "read", lambda self, name: wholly.append(name) or read(self, name))
    for index in range(3):
        assert_same(load_shard("npz", path=archive, num_shards=3, index=index, **options), whole.shard(3, index))
    # Ids or labels say whose a row is; nothing is left out of an array without bytes; columns do not lie row by row.
    assert set(wholly) <= {"client", "y", "none", "column"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"keys": ["imag"]}, "has no array 'imag'"),
        ({"keys": ["other"]}, r"'other' has shape \(3,\), but client_ids has 11 rows"),
        ({"client_key": "x"}, "client_ids must be 1-D"),
        ({"keys": ["x"], "partition": ("natural", {})}, "array of 'npz'"),
    ],
)
def test_a_shard_of_a_bad_archive_is_refused_as_the_whole_is(archive, options, text):
    with pytest.raises(ValueError, match=text):
        load("npz", path=archive, **options)
    with pytest.raises(ValueError, match=text):
        load_shard("npz", path=archive, num_shards=2, index=0, **options)


def test_damage_beyond_the_shard_is_found(tmp_path):
    path = tmp_path / "rows.npz"
    np.savez(path, client=np.arange(500), y=np.ones(500))
    content = bytearray(path.read_bytes())
    content[content.rindex(np.ones(9).tobytes())] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match="array 'y' cannot be read: Bad CRC"):
        load_shard("npz", path=path, num_shards=2, index=0)


def test_an_array_may_lie_under_its_bare_name(tmp_path):
    path = tmp_path / "rows.npz"
    with zipfile.ZipFile(path, "w") as file:
        for name, array in {"client": IDS, **ROWS}.items():
            with file.open(name, "w") as member:
                np.save(member, array)
    assert_same(load("npz", path=path), federation())
    assert_same(load_shard("npz", path=path, num_shards=2, index=1), federation().shard(2, 1))


def test_a_shard_of_a_folder_stays_mapped(tmp_path):
    federation().save(tmp_path / "a")
    shard = load_shard("stored", path=tmp_path / "a", num_shards=2, index=1)
    assert_same(shard, federation().shard(2, 1))
    assert all(isinstance(x, np.memmap) for x in shard.arrays.values())


def test_what_is_drawn_is_cut():
    options = {"alpha": 1.0, "beta": 1.0, "clients": 5, "seed": 2}
    assert_same(load_shard("synthetic", num_shards=2, index=1, **options), load("synthetic", **options).shard(2, 1))
