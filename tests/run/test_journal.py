"""What clients keep, in a journal: bit for bit what was saved, whatever byte was cut or altered and whenever the disk died."""

import json
import os
import tempfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import Crash, Disk, mounted
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfed import files
from jaxfed.messages import RunState
from jaxfed.run import checkpoint, journal, tables
from jaxfed.run.checkpoint import Changed, checkpoints, load_run, newest, save_run
from jaxfed.run.journal import Position, Rows

CLIENTS = 6


def host_table(seed=0, count=CLIENTS):
    """Kept rows of many types, on the host; clients that nobody has seen have zeros."""
    rng = np.random.default_rng(seed)
    kept = {
        "c": rng.normal(size=(count, 3)).astype(np.float32),
        "half": rng.normal(size=(count, 2)).astype(jnp.bfloat16),
        "mask": rng.random(count) < 0.5,
        "none": np.zeros((count, 0), np.float32),
        "small": rng.integers(-9, 9, (count, 1, 2)).astype(np.int8),
    }
    kept["c"][::2, 0], kept["c"][1::2, 0] = np.nan, -0.0
    return kept


def state_of(kept, seen, round):
    return RunState(
        jnp.asarray(round), {"w": jnp.full(2, round, float)}, {}, (), (), (), kept, jnp.asarray(seen), jax.random.key(3)
    )


def on_device(kept):
    return jax.tree.map(jnp.asarray, kept)


def on_host(kept):
    return kept


def bits(kept):
    raw = [jax.random.key_data(x) if tables.is_key(x) else x for x in jax.tree.leaves(kept)]
    return [(x.dtype.name, x.shape, np.asarray(x).tobytes()) for x in raw]


class Story:
    """A run told twice: to a folder, and to a dict of what each round's table was."""

    def __init__(self, folder, place=on_host):
        self.folder, self.place = folder, place
        self.kept, self.seen = jax.tree.map(np.zeros_like, host_table()), np.zeros(CLIENTS, bool)
        self.round, self.since, self.changed = 0, 0, []
        self.told = {}

    def train(self, ids, seed):
        ids, new = np.asarray(ids), host_table(seed)
        self.kept = jax.tree.map(np.copy, self.kept)
        for name, table in self.kept.items():
            table[ids] = new[name][ids]
        self.seen = self.seen.copy()
        self.seen[ids] = True
        self.round += 1
        self.changed += ids.tolist()

    def save(self, keep=2, everything=False):
        self.told[self.round] = (bits(self.kept), self.seen.tobytes(), self.kept, self.seen)
        changed = None if everything else Changed(self.since, np.array(self.changed, int))
        save_run(state_of(self.place(self.kept), self.seen, self.round), self.folder, keep=keep, changed=changed)
        self.since, self.changed = self.round, []

    def template(self):
        return state_of(self.place(host_table(99)), np.ones(CLIENTS, bool), 0)

    def restore(self):
        """Goes back to what the folder holds, after comparing it with what was told."""
        state = load_run(self.template(), self.folder)
        self.round = self.since = int(state.round)
        expected, seen, self.kept, self.seen = self.told[self.round]
        assert bits(state.kept) == expected
        assert np.asarray(state.seen).tobytes() == seen
        self.changed = []
        return state


def segment_of(folder, name):
    return json.loads((Path(folder) / name / "manifest.json").read_text())["journal"]["segment"]


ROUNDS = [[0, 3], [3, 0], [0, 3], [0, 3], [0, 3], [1], [5]]
"""Who took part in each; with so few clients the journal is compacted on the way."""


def tell(story):
    for seed, ids in enumerate(ROUNDS):
        story.train(ids, seed)
        story.save()


def test_every_type_of_row_comes_back_from_device_and_host(tmp_path):
    for number, place in enumerate([on_device, on_host]):
        with mounted():
            story = Story(tmp_path / str(number), place)
            tell(story)
            state = story.restore()
        assert {type(x) for x in jax.tree.leaves(state.kept)} == {type(x) for x in jax.tree.leaves(story.template().kept)}
        # It must have gone on in a segment as well as begun new ones, or this test shows less than it says.
        assert 1 < int(journal.segments(story.folder)[-1].name[8:-8]) < len(ROUNDS)


def test_typed_keys_come_back(tmp_path):
    keys = jax.random.split(jax.random.key(5), CLIENTS)
    with mounted():
        save_run(state_of(keys, np.ones(CLIENTS, bool), 1), tmp_path)
        other = jax.random.split(jax.random.key(0), CLIENTS)
        state = load_run(state_of(other, np.zeros(CLIENTS, bool), 0), tmp_path)
    assert bits(state.kept) == bits(keys)
    assert state.kept.dtype == keys.dtype


def test_a_table_in_a_file_is_filled_in_place_and_unseen_rows_are_emptied(tmp_path):
    seen = np.array([True, False] * 3)
    kept = np.where(seen[:, None], host_table()["c"], 0)
    template = np.memmap(tmp_path / "table", np.float32, "w+", shape=(CLIENTS, 3))
    template[:] = 7
    with mounted():
        save_run(state_of(kept, seen, 1), tmp_path)
        state = load_run(state_of(template, seen, 0), tmp_path)
    assert state.kept is template
    assert bits(np.array(template)) == bits(kept)


def test_small_tables_stay_part_of_their_checkpoint_and_large_ones_do_not(tmp_path, monkeypatch):
    seen, kept = np.ones(CLIENTS, bool), host_table()["c"]
    for limit, names in ((kept.nbytes, ["00000001"]), (kept.nbytes - 1, ["00000001", "clients-000001.journal"])):
        monkeypatch.setattr(checkpoint, "JOURNAL_BYTES", limit)
        folder = tmp_path / str(limit)
        save_run(state_of(kept, seen, 1), folder)
        assert sorted(os.listdir(folder)) == names
        assert bits(load_run(state_of(kept * 0, seen, 0), folder).kept) == bits(kept)


def test_a_checkpoint_costs_its_changed_rows_until_the_journal_outgrows_the_table(tmp_path):
    row = 8 + 12 + 4 + 1 + 0 + 2
    with mounted():
        story, sizes = Story(tmp_path), []
        for seed in range(12):
            story.train(range(CLIENTS) if seed == 0 else [seed % CLIENTS], seed)
            story.save()
            sizes.append(sum(path.stat().st_size for path in journal.segments(tmp_path)))
    record = 28 + 32 + row
    steps = np.diff(sizes)
    assert steps[0] == record
    assert set(steps) - {record}
    # Two checkpoints need two segments at most, each below twice the table and what says what a row is.
    described = sizes[0] - 2 * (28 + 32) - CLIENTS * row
    assert max(sizes) < 2 * 2 * (CLIENTS * row + described + 2 * (28 + 32)) + 2 * (28 + 32)


def test_a_round_saved_again_continues_the_journal(tmp_path):
    with mounted():
        story = Story(tmp_path)
        story.train([0, 1, 2, 3], 0)
        story.save()
        path, before = journal.segments(tmp_path)[0], journal.segments(tmp_path)[0].read_bytes()
        story.save()
        assert path.read_bytes() == before
        story.restore()


def test_rows_that_another_checkpoint_needs_are_never_cut(tmp_path):
    """Going on from the older of two leaves the newer one whole."""
    with mounted():
        story = Story(tmp_path)
        story.train([0, 1, 2, 3], 0)
        story.save()
        story.train([4], 1)
        story.save()
        newer = story.told[2]
        story.round, story.since, story.kept, story.seen = 1, 1, story.told[1][2], story.told[1][3]
        story.train([5], 7)
        story.round = 3
        story.save()
        story.restore()
        assert bits(checkpoint.open_checkpoint(tmp_path / "00000002").load(story.template()).kept) == newer[0]
    assert segment_of(tmp_path, "00000002") != segment_of(tmp_path, "00000003")


@pytest.fixture
def three(tmp_path):
    """Three checkpoints in one segment, and where each ends."""
    with mounted():
        story = Story(tmp_path)
        for seed, ids in enumerate([[0, 1, 2, 3], [1], [4, 0]]):
            story.train(ids, seed)
            story.save(keep=3)
        (path,) = journal.segments(tmp_path)
        yield story, path, [newest_of.journal.size for newest_of in map(checkpoint.open_checkpoint, checkpoints(tmp_path)[::-1])]


def check_falls_back(story, sizes, intact):
    """The newest checkpoint is the one whose rows all lie in the intact beginning."""
    whole = sum(size <= intact for size in sizes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if whole == 0:
            with pytest.raises(ValueError, match=r"No checkpoint in .*(cut short or altered|missing)"):
                story.restore()
            return
        assert int(story.restore().round) == whole
    assert len(caught) == len(sizes) - whole
    assert all("as they were written" in str(w.message) for w in caught)


def test_cut_at_every_byte(three):
    story, path, sizes = three
    content = path.read_bytes()
    assert sizes[-1] == len(content)
    for size in range(len(content)):
        path.write_bytes(content[:size])
        check_falls_back(story, sizes, size)


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_altered_at_every_byte(three, flip):
    story, path, sizes = three
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :])
        check_falls_back(story, sizes, at)


def test_whatever_follows_a_position_is_cut(three):
    story, path, _ = three
    content = path.read_bytes()
    for tail in (b"\0", b"rows", content[-90:], content):
        path.write_bytes(content + tail)
        story.restore()
        story.train([5], 11)
        story.save(keep=3)
        story.restore()
        path.write_bytes(content)
        story.round = story.since = 3
        _, _, story.kept, story.seen = story.told[3]
        files.discard(story.folder / "00000004")


def test_a_missing_journal_is_named(three):
    story, path, sizes = three
    path.unlink()
    check_falls_back(story, sizes, 0)


def test_a_record_of_an_older_segment_is_refused_in_its_place(tmp_path):
    """The same rows after other ones have another digest, so files cannot be mixed."""
    leaves, rows = {"c": np.zeros(1)}, [Rows(1, np.array([i]), [np.full((1, 1), float(i))]) for i in range(3)]
    first = journal.start(tmp_path, leaves, rows[:2])
    second = journal.start(tmp_path, leaves, [rows[2], rows[1]])
    assert first.size == second.size
    assert first.digest != second.digest
    with pytest.raises(ValueError, match=r"clients-000002.* as they were written"):
        journal.verify(tmp_path, second._replace(digest=first.digest))


@pytest.mark.parametrize("leaves", [{"d": np.zeros(1)}, {"c": np.zeros(2)}, {"c": np.zeros(1, np.int64)}, {}])
def test_rows_of_other_leaves_are_refused(tmp_path, leaves):
    end = journal.start(tmp_path, {"c": np.zeros(1)}, [Rows(1, np.array([0]), [np.ones((1, 1))])])
    with pytest.raises(ValueError, match="other leaves"):
        list(journal.replay(tmp_path, end, leaves))


@pytest.mark.parametrize(
    "forged",
    [
        {},
        {"segment": "a", "size": 1},
        {"segment": "../a", "size": 1, "digest": ""},
        {"segment": "a", "size": "1", "digest": ""},
        {"segment": "a", "size": True, "digest": ""},
        {"segment": "a", "size": 1, "digest": "", "more": 1},
        [1],
        "a",
    ],
)
def test_a_forged_position_is_refused(three, forged):
    story, _, _ = three
    path = story.folder / "00000003" / "manifest.json"
    manifest = json.loads(path.read_text()) | {"journal": forged}
    del manifest["digest"]
    path.write_text(json.dumps(manifest | {"digest": files.digest_of(manifest)}))
    with pytest.warns(UserWarning, match=r"journal: expected the position of a record.* Going back to round 2\."):
        story.restore()


def test_extending_a_segment_that_is_too_short_says_so(tmp_path):
    end = journal.start(tmp_path, {"c": np.zeros(1)}, [])
    with pytest.raises(ValueError, match=rf"was cut short: expected {end.size + 1} bytes or more, got {end.size}\."):
        journal.extend(tmp_path, Position(end.segment, end.size + 1, end.digest), [])


@pytest.mark.parametrize("ids", [[-1], [CLIENTS], [0, 99]])
def test_changed_clients_must_exist(tmp_path, ids):
    with mounted():
        story = Story(tmp_path)
        story.train([0, 1, 2], 0)
        story.save()
        with pytest.raises(ValueError, match=r"changed\.ids: expected clients from 0 to 5, got"):
            save_run(state_of(story.kept, story.seen, 2), tmp_path, changed=Changed(1, np.array(ids)))


@pytest.mark.parametrize(
    "disks",
    [
        pytest.param([False, True], id="in-turn"),
        pytest.param([True, False], id="the-other-turn", marks=pytest.mark.slow),
    ],
)
def test_dying_at_every_operation(tmp_path, disks):
    """The folder holds the last complete checkpoint or the one under way, and the run goes on from it."""
    with mounted() as whole:
        tell(Story(tmp_path / "whole"))
        assert [path.name for path in journal.segments(tmp_path / "whole")] == ["clients-000002.journal"]
    assert whole.count > 100
    for number in range(1, whole.count + 1):
        folder, disk = tmp_path / str(number), Disk(number, forgets=disks[number % 2])
        story = Story(folder)
        with mounted(disk), pytest.raises(Crash):
            tell(story)
        disk.forget(folder)
        with mounted():
            go_on(story)
        assert not list(folder.glob(f"{files.PARTIAL}*"))
        assert {path.name for path in journal.segments(folder)} == {segment_of(folder, p.name) for p in checkpoints(folder)}


def go_on(story):
    """From what the crash has left."""
    complete, under_way = story.since, story.round
    if newest(story.folder) is None:
        assert complete == 0
        story.__init__(story.folder)
    else:
        story.restore()
        assert story.round in (complete, under_way)
    for ids in ([0, 5], [1]):
        story.train(ids, 17)
        story.save()
        story.restore()


ACTIONS = st.one_of(
    st.tuples(st.just("train"), st.sets(st.integers(0, CLIENTS - 1), min_size=1), st.integers(0, 2**16)),
    st.tuples(st.just("save"), st.booleans()),
    st.tuples(st.just("crash"), st.integers(1, 40), st.booleans()),
    st.tuples(st.just("restore"), st.booleans()),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(ACTIONS, max_size=25), st.booleans())
def test_any_sequence_of_actions_against_a_dict(actions, device):
    with tempfile.TemporaryDirectory() as folder:
        story = Story(Path(folder, "run"), on_device if device else on_host)
        for action, *arguments in actions:
            {"train": train, "save": save, "crash": crash, "restore": restore}[action](story, *arguments)


def train(story, ids, seed):
    story.train(sorted(ids), seed)


def save(story, everything):
    with mounted():
        story.save(everything=everything)


def crash(story, number, forgets):
    # To replace a checkpoint of the same round is to remove it first.
    if story.since == story.round:
        return
    disk = Disk(number, forgets)
    complete, under_way = story.since, story.round
    with mounted(disk):
        try:
            story.save()
        except Crash:
            disk.forget(story.folder)
        restore_or_begin(story)
    assert story.round in (complete, under_way)


def restore(story, all_changed):
    with mounted():
        restore_or_begin(story)
    story.changed = list(range(CLIENTS)) if all_changed else []


def restore_or_begin(story):
    with mounted():
        if newest(story.folder) is None:
            story.__init__(story.folder, story.place)
        else:
            story.restore()
