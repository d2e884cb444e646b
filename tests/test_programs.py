"""What a traced program's loops do, counted by hand."""

import jax
import jax.numpy as jnp

from jaxfed.programs import loop_work

# A loop's own operations each give a number: it counts, and looks whether it is through.
COUNTER = 2


def work(function, *arguments, depth):
    return loop_work(jax.make_jaxpr(function)(*arguments).jaxpr, depth)


def test_a_scan_counts_as_often_as_it_runs_and_a_while_once():
    def steps(w, x, count):
        def step(_, w):
            states, _ = jax.lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, None, length=7)
            return w + states.sum()

        return jax.lax.fori_loop(0, count, step, jnp.exp(w))

    found = work(steps, jnp.ones((3, 3)), jnp.ones((2, 3)), 5, depth=1)
    assert (found.flops, found.curved) == (7 * 2 * 2 * 3 * 3, 7 * 2 * 3)


def test_a_product_over_several_axes_and_calls_within_calls_count():
    @jax.jit
    def inner(x, y):
        return jax.nn.sigmoid(jnp.einsum("abc,dbc->ad", x, y))

    found = work(lambda x, y: inner(x, y) * 2, jnp.ones((2, 3, 4)), jnp.ones((5, 3, 4)), depth=0)
    assert (found.flops, found.curved) == (2 * 2 * 5 * 3 * 4, 2 * 5)


def test_numbers_that_go_straight_into_a_larger_array_are_not_curved():
    def write(value, table):
        return jax.lax.dynamic_update_slice(table, value[None], (1, 0))

    table = jnp.zeros((3, 4))
    assert work(lambda x: write(jnp.tanh(x), table), jnp.ones(4), depth=0).curved == 0
    assert work(lambda x: write(jnp.tanh(x), table) + jnp.exp(x)[None], jnp.ones(4), depth=0).curved == 4
    # What is written into is no such number, and neither is one that something else reads too.
    assert work(lambda x, t: write(x, jnp.tanh(t)), jnp.ones(4), table, depth=0).curved == 12
    assert work(lambda x: (write(y := jnp.tanh(x), table), y * x), jnp.ones(4), depth=0).curved == 4


def test_of_an_array_that_is_written_into_only_what_is_written_counts():
    def write(value, table):
        return jax.lax.optimization_barrier(jax.lax.dynamic_update_slice(table, value, (1, 0)))

    assert work(lambda x, t: write(-x, t), jnp.ones((1, 4)), jnp.zeros((100, 4)), depth=0) == (0, 0, 4 + 4, 0)


def test_side_by_side_too_only_what_is_written_counts():
    def write(x, table, place):
        return jax.lax.dynamic_update_slice(table, jnp.tanh(x)[None], (place, 0))

    # JAX makes another operation of it.
    several = jax.vmap(write, in_axes=(0, 0, None))
    short, long = (work(several, jnp.ones((3, 4)), jnp.zeros((3, rows, 4)), 1, depth=0) for rows in (5, 500))
    assert short == long
    assert long.curved == 0


def test_work_outside_of_the_loops_asked_for_does_not_count():
    def rounds(w, count):
        return jax.lax.fori_loop(0, count, lambda _, w: jnp.sqrt(w @ w), w)

    assert work(rounds, jnp.ones((3, 3)), 3, depth=1) == (54, 9, 9 + 9 + COUNTER, 9 + COUNTER)
    assert work(rounds, jnp.ones((3, 3)), 3, depth=2) == (0, 0, 0, 0)


def test_results_count_once_and_not_again_for_the_call_or_loop_around_it():
    @jax.jit
    def product(x, sums):
        return x * jax.lax.broadcast_in_dim(sums, (4, 3), (1,))

    def steps(x, count):
        def step(_, x):
            sums, _ = jax.lax.scan(lambda total, row: (total + row, None), jnp.zeros(3), x)
            return product(x, sums)

        return jax.lax.fori_loop(0, count, step, x)

    zeros, additions, spread, products = 3, 4 * 3, 4 * 3, 4 * 3
    assert work(steps, jnp.ones((4, 3)), 5, depth=1)[:3] == (0, 0, zeros + additions + spread + products + COUNTER)


def test_an_inner_loop_over_rows_counts_for_each_of_them():
    def steps(w, x, count):
        def row(i, total):
            return total + jax.lax.dynamic_slice(x, (2 * i, 0), (2, 3)) @ w

        def step(_, w):
            return w + jax.lax.fori_loop(0, jnp.int32(w[0, 0]), row, jnp.zeros((2, 3))).sum()

        return jax.lax.fori_loop(0, count, step, w)

    found = work(steps, jnp.ones((3, 3)), jnp.ones((8, 3)), 5, depth=1)
    assert found.flops == 4 * 2 * 2 * 3 * 3
    assert found.carried == 9 + COUNTER
    # Of two lanes each goes as far as its own weights say.
    lanes = work(jax.vmap(steps, (0, 0, None)), jnp.ones((2, 3, 3)), jnp.ones((2, 8, 3)), 5, depth=1)
    assert lanes.flops == 2 * found.flops


def test_of_a_scan_the_results_are_not_carried():
    def steps(w):
        return jax.lax.scan(lambda w, _: (2 * w, jnp.ones(100)), w, None, length=7)

    assert work(steps, jnp.ones((3, 3)), depth=1).carried == 9
