"""Which rows a local step sees, against a description in plain Python."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxfed import ClientRows, Epochs, Poisson, Steps

START, CAPACITY = 100, 12
ARRAYS = {"row": jnp.arange(200, dtype=jnp.int32), "x": jnp.arange(400.0).reshape(200, 2)}


def client(size, work=1.0):
    """Rows ``START`` to ``START + size - 1`` of 200."""
    return ClientRows(ARRAYS, START, size, work, CAPACITY)


@partial(jax.jit, static_argnames="count")
def _batches(policy, rows, key, count):
    batches = policy.of(rows, key)
    return jax.vmap(batches.batch)(jnp.arange(count)), batches.steps


def steps_of(policy, size, count=None, seed=0, work=1.0):
    """Every local step's rows, numbers within the client, with those that are masked, and the masks."""
    batch, steps = jax.device_get(_batches(policy, client(size, work), jax.random.key(seed), 24))
    count = int(steps) if count is None else count
    assert count <= 24
    np.testing.assert_array_equal(batch["x"][..., 0], 2.0 * batch["row"])
    return batch["row"][:count] - START, batch["mask"][:count]


def seen(rows, masks):
    return [r[m].tolist() for r, m in zip(rows, masks)]


@pytest.mark.parametrize("size", [1, 4, 5, 6, 11, 12])
@pytest.mark.parametrize("batch_size", [1, 5, 12, 20, None])
def test_every_pass_sees_every_row_once(size, batch_size):
    rows, masks = steps_of(Epochs(batch_size, epochs=2), size, seed=size)
    width = CAPACITY if batch_size is None else batch_size
    sizes = [min(width, size - first) for first in range(0, size, width)]
    assert rows.shape == (2 * len(sizes), width)
    assert masks.sum(1).tolist() == sizes * 2
    for one_pass in np.split(np.arange(len(rows)), 2):
        assert sorted(rows[one_pass][masks[one_pass]].tolist()) == list(range(size))


def test_padding_stands_at_the_end_and_repeats_a_row_of_the_client():
    rows, masks = steps_of(Epochs(5, epochs=3), 7)
    assert masks.tolist() == [[True] * 5, [True, True, False, False, False]] * 3
    assert ((rows >= 0) & (rows < 7)).all()


def test_every_pass_and_every_key_has_an_order_of_its_own():
    passes = [steps_of(Epochs(5), 12, seed=seed) for seed in range(1, 6)]
    passes += zip(*(np.split(x, 5) for x in steps_of(Epochs(5, epochs=5), 12)))
    assert len({tuple(rows[masks].tolist()) for rows, masks in passes}) == 10


def test_without_shuffling_every_pass_is_in_the_order_of_the_data():
    assert seen(*steps_of(Epochs(5, shuffle=False, epochs=2), 7)) == [[0, 1, 2, 3, 4], [5, 6]] * 2


@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_number_of_steps_wraps_into_new_passes(size):
    rows, masks = steps_of(Steps(2, steps=20), size)
    assert len(rows) == 20
    per_pass = -(-size // 2)
    whole = [slice(i, i + per_pass) for i in range(0, 20 - per_pass + 1, per_pass)]
    passes = [rows[one][masks[one]].tolist() for one in whole]
    assert all(sorted(one) == list(range(size)) for one in passes)
    assert size == 1 or len({tuple(one) for one in passes}) > 1


NUMBERS = [
    (Epochs(5), 12, 1.0, 3),
    (Epochs(5, epochs=4), 12, 1.0, 12),
    (Epochs(5, epochs=4), 12, 0.5, 6),
    (Epochs(5, epochs=4), 12, 0.3, 4),
    (Epochs(None, epochs=4), 3, 1.0, 4),
    (Epochs(5, epochs=4), 12, 0.0, 0),
    (Epochs(5, epochs=4), 0, 1.0, 0),
    (Steps(5, steps=10), 12, 1.0, 10),
    (Steps(5, steps=10), 1, 0.25, 2),
    (Steps(5, steps=10), 12, 1.7, 17),
    (Steps(None, steps=10), 0, 1.0, 0),
    (Poisson(5, steps=10), 12, 0.5, 5),
    (Poisson(5, steps=10), 0, 1.0, 0),
]


@pytest.mark.parametrize(("policy", "size", "work", "steps"), NUMBERS)
def test_the_number_of_steps(policy, size, work, steps):
    found = policy.num_steps(jnp.array(size), work, CAPACITY)
    assert found.item() == steps
    assert found.dtype == jnp.int32
    assert policy.of(client(size, work), jax.random.key(0)).steps.item() == steps


def test_the_numbers_of_many_clients_at_once():
    sizes, work = np.array([0, 1, 5, 6, 12]), np.array([1.0, 1.0, 1.0, 0.5, 2.0], np.float32)
    assert Epochs(5, epochs=2).num_steps(sizes, work, 12).tolist() == [0, 2, 2, 2, 12]


@pytest.mark.parametrize("policy", [Epochs(5), Steps(5, steps=3), Poisson(5, steps=3)], ids=lambda p: p.name)
def test_a_client_without_rows_takes_no_step(policy):
    batches = policy.of(client(0), jax.random.key(0))
    assert batches.fold(lambda carry, batch, key: carry + 1, jnp.zeros(())).item() == 0
    assert batches.fold_all(lambda carry, batch: carry + 1, jnp.zeros(())).item() == 0


def test_work_and_epochs_are_data():
    traces = []

    @jax.jit
    def count(policy, rows):
        traces.append(1)
        return policy.of(rows, jax.random.key(0)).fold(lambda carry, batch, key: carry + batch["mask"].sum(), 0)

    assert count(Epochs(5), client(12)) == 12
    assert count(Epochs(5, epochs=3), client(12)) == 36
    assert count(Epochs(5, epochs=3), client(10, work=2.0)) == 60
    assert len(traces) == 1


def test_fold_is_a_loop_over_batches_with_a_key_each():
    batches = Epochs(5, epochs=2).of(client(12), jax.random.key(3))

    def step(carry, batch, key):
        rows, draws, k = carry
        return rows.at[k].set(batch["row"] * batch["mask"]), draws.at[k].set(jax.random.uniform(key)), k + 1

    rows, draws, steps = batches.fold(step, (jnp.zeros((8, 5), jnp.int32), jnp.zeros(8), 0))
    expected = [batches.batch(k) for k in range(6)]
    np.testing.assert_array_equal(rows[:6], [batch["row"] * batch["mask"] for batch in expected])
    assert int(steps) == 6
    assert len(set(draws[:6].tolist())) == 6


@pytest.mark.parametrize("policy", [Epochs(5), Epochs(None), Steps(5, steps=1), Poisson(5, rate=0.5)], ids=str)
def test_a_pass_over_all_rows_is_in_order_whatever_the_policy(policy):
    batches = policy.of(client(12), jax.random.key(0))

    def step(carry, batch):
        marked, k = carry
        number = k + jnp.cumsum(batch["mask"])
        return marked.at[jnp.where(batch["mask"], batch["row"] - START, 99)].add(number, mode="drop"), k + batch["mask"].sum()

    marked, count = batches.fold_all(step, (jnp.zeros(12, jnp.int32), 0))
    assert int(count) == 12
    assert marked.tolist() == list(range(1, 13))


def test_the_rows_of_a_client_alone():
    rows = ClientRows.of({"x": np.arange(6.0).reshape(3, 2), "y": [5, 6, 7]})
    batch = Epochs(None, shuffle=False).of(rows, jax.random.key(0)).batch(0)
    assert batch["x"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert batch["y"].tolist() == [5, 6, 7]
    assert batch["mask"].tolist() == [True] * 3


# Poisson batches, two-sided: sizes and inclusions that vary too little are refused, too.

DRAWS = 4000


@pytest.fixture(scope="module")
def drawn():
    """``[DRAWS, 11]``: which of 11 rows are in a batch, each with probability 0.3."""

    @jax.jit
    def draw(key):
        batch = Poisson(12, rate=0.3).of(client(11), key).batch(0)
        return jnp.zeros(11, jnp.int32).at[batch["row"] - START].add(batch["mask"])

    found = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(5), DRAWS)))
    assert set(np.unique(found)) == {0, 1}
    return found


def is_binomial(counts, n, rate):
    """Chi-square of counts against Binomial(n, rate), cells of an expected 5 and more, two-sided."""
    expected = stats.binom.pmf(np.arange(n + 1), n, rate) * len(counts)
    observed = np.bincount(counts, minlength=n + 1)
    common = expected >= 5
    pooled = [np.append(x[common], x[~common].sum()) for x in (observed, expected)]
    return 1e-4 < stats.chisquare(*pooled, sum_check=False).pvalue < 1 - 1e-4


def test_sizes_of_poisson_batches_are_binomial(drawn):
    assert is_binomial(drawn.sum(1), 11, 0.3)
    assert not is_binomial(np.full(DRAWS, 3), 11, 0.3)
    assert not is_binomial(np.random.default_rng(0).binomial(11, 0.32, DRAWS), 11, 0.3)


def test_every_row_has_the_same_probability(drawn):
    deviation = (drawn.sum(0) - 0.3 * DRAWS) ** 2 / (DRAWS * 0.3 * 0.7)
    assert 1e-4 < stats.chi2.sf(deviation.sum(), 11) < 1 - 1e-4


def test_rows_are_drawn_independently(drawn):
    correlations = np.corrcoef(drawn.T)[np.triu_indices(11, 1)] * np.sqrt(DRAWS)
    assert 1e-4 < stats.chi2.sf((correlations**2).sum(), len(correlations)) < 1 - 1e-4


def test_poisson_batches_are_cut_at_the_batch_size():
    rows, masks = steps_of(Poisson(4, rate=1.0, steps=20), 11)
    assert masks.all()
    assert all(len(set(r)) == 4 for r in rows.tolist())
    assert len({tuple(r) for r in rows.tolist()}) > 10


def test_a_rate_of_one_takes_every_row():
    rows, masks = steps_of(Poisson(12, rate=1.0, steps=3), 11)
    assert [sorted(one) for one in seen(rows, masks)] == [list(range(11))] * 3


BAD = [
    (lambda: Epochs(0), ValueError, "Epochs.batch_size: expected an integer at least 1, got 0"),
    (lambda: Epochs(2.5), TypeError, "Epochs.batch_size: expected an integer, got 2.5"),
    (lambda: Epochs(5, epochs=0), ValueError, "Epochs.epochs: expected an integer at least 1, got 0"),
    (lambda: Steps(5, steps=0), ValueError, "Steps.steps: expected an integer at least 1, got 0"),
    (lambda: Poisson(5, rate=0.0), ValueError, "Poisson.rate: expected a finite number above 0 and at most 1, got 0.0"),
    (lambda: Poisson(5, rate=1.5), ValueError, "Poisson.rate: expected a finite number above 0 and at most 1, got 1.5"),
    (lambda: Epochs(5, shuffle="false"), ValueError, "Epochs.shuffle: expected one of"),
]


@pytest.mark.parametrize(("make", "error", "text"), BAD)
def test_bad_policies_are_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()
