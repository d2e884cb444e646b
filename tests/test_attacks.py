"""Attacks do what they say, to the clients they should, and to no other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfed
from jaxfed import CentredClipping, Krum, Mean, Median
from jaxfed.attacks import ALittleIsEnough, GaussianUpload, Malicious, Scaling, SignFlip, flip_labels, largest_shift
from jaxfed.messages import CohortInfo, Upload
from jaxfed.testing import check_config, check_pytree

ATTACKERS = (1, 4)


def upload(seed=0):
    rng = np.random.default_rng(seed)
    delta = {"a": jnp.asarray(rng.normal(size=3), float), "b": jnp.asarray(rng.normal(size=(2, 2)), float)}
    return Upload(delta, {"mean": jnp.ones(2)}, {}, {"examples": jnp.array(5.0)})


@pytest.mark.parametrize(("attack", "factor"), [(SignFlip(), -1), (SignFlip(3.0), -3), (Scaling(20.0), 20)])
def test_attacks_on_the_update(attack, factor):
    sent = attack(upload(), jax.random.key(0))
    for name, leaf in upload().delta.items():
        np.testing.assert_allclose(sent.delta[name], factor * leaf, rtol=1e-6)
    assert sent._replace(delta=()) == upload()._replace(delta=(), stats=sent.stats)


def test_gaussian_upload_has_its_scale_and_is_drawn_leaf_by_leaf():
    """Over 2 x 10,000 draws the standard deviation is known to 0.5%, a correlation to 0.01."""
    large = upload()._replace(delta={"a": jnp.zeros(10_000), "b": jnp.zeros(10_000)})
    noise = GaussianUpload(0.3)(large, jax.random.key(1)).delta
    assert np.std([noise["a"], noise["b"]]) == pytest.approx(0.3, rel=0.03)
    assert abs(np.corrcoef(noise["a"], noise["b"])[0, 1]) < 0.05


@pytest.mark.parametrize("part", [SignFlip(2.0), Scaling(2.0), GaussianUpload(2.0)])
def test_attacks_keep_the_laws_of_parts(part):
    check_config(part)
    check_pytree(part)
    assert jax.tree.structure(part(upload(), jax.random.key(0))) == jax.tree.structure(upload())


# ---- clients


def loss(params, batch, key):
    return jnp.square(batch["x"] @ params - batch["y"])


def federation(clients=6, rows=4, marked=True):
    rng = np.random.default_rng(2)
    owners = np.repeat(np.arange(clients), rows)
    x = rng.normal(size=(clients * rows, 2)).astype(np.float32)
    arrays = {"x": x, "y": x @ np.array([1.0, -2.0], np.float32)}
    return jaxfed.FederatedData.from_arrays(arrays | ({"attacker": np.isin(owners, ATTACKERS)} if marked else {}), owners)


HONEST = jaxfed.fedavg(loss, lrate=0.1, batch_size=2)


def attacked(attack, aggregator=None):
    return HONEST.replace(client=Malicious(HONEST.client, attack), aggregator=aggregator or Mean("uniform"))


def run(algorithm, rounds=3, data=None, **options):
    simulation = jaxfed.Simulation(algorithm, federation() if data is None else data, **options)
    return simulation.run(simulation.init(jnp.zeros(2), key=jax.random.key(3)), rounds=rounds)


def test_marks_follow_the_client_through_cohorts():
    _, history = run(attacked(SignFlip()), rounds=8, cohort_size=3)
    for report in history:
        np.testing.assert_array_equal(report.metrics["attacker"], np.isin(report.clients, ATTACKERS))


def test_marking_alone_changes_nothing():
    alone, _ = run(HONEST.replace(aggregator=Mean("uniform")), data=federation(marked=False))
    np.testing.assert_array_equal(run(attacked(None))[0].params, alone.params)


def test_only_attackers_change_what_they_send():
    """One round: the mean of all, less twice the attackers' share."""
    full = jaxfed.fedavg(loss, lrate=0.1, batch_size=None, weights="uniform")
    algorithm, data = full.replace(client=Malicious(full.client, SignFlip())), federation()
    sent = []
    for i in range(data.num_clients):
        rows = data.client(i)
        sent.append((-0.2 * rows["y"][:, None] * rows["x"]).mean(0) * (-1 if i in ATTACKERS else 1))
    np.testing.assert_allclose(run(algorithm, rounds=1)[0].params, -np.mean(sent, axis=0), rtol=1e-5)


def test_noise_is_that_of_the_clients_key():
    """The key is the client's own in every round, so that no two attackers send the same."""
    client, rows = Malicious(HONEST.client, GaussianUpload()), jaxfed.ClientRows.of(federation().client(1))
    start = jaxfed.Broadcast(jnp.zeros(2), {}, {}, 0)
    send = jax.jit(lambda key: client.run(start, client.init_kept(start, key), rows, key)[0].delta)
    first, again, other = (send(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).min() > 1e-3
    # Streams 0 and 1 of the same key order the batches, 2 is a personal model's.
    plain = Upload(start.params, {}, {}, {})
    for stream in range(3):
        assert np.abs(first - GaussianUpload()(plain, jax.random.fold_in(jax.random.key(0), stream)).delta).min() > 1e-3


class Keeper(jaxfed.ClientUpdate, register=False):
    """A client with answers of its own."""

    aux_reductions = {"total": "mean"}

    def shared(self, params):
        return params[:1]

    def personalize(self, start, kept, rows, key):
        return kept


def test_what_is_no_upload_stays_the_wrapped_clients():
    client = Malicious(Keeper(), SignFlip())
    assert client.personalize(None, 7, None, None) == 7
    assert client.shared([1, 2]) == [1]
    assert client.aux_reductions == {"total": "mean"}


def test_the_global_model_under_attack_is_evaluated_on_any_clients():
    """An attack makes no algorithm a personal one: a run may be evaluated on the honest clients alone, whose number differs."""
    data = federation()
    honest = data.select([k for k in range(data.num_clients) if k not in ATTACKERS])
    simulation = jaxfed.Simulation(attacked(SignFlip()), data)
    state, history = simulation.run(
        simulation.init(jnp.zeros(2), key=jax.random.key(0)), rounds=1, eval_every=1, eval_data=honest
    )
    assert history[-1].evaluation.metrics == simulation.evaluate(state, honest).metrics
    personal = Malicious(jaxfed.finetuned(loss, lrate=0.1, batch_size=2).client)
    assert personal.personalizes


def test_label_flip_is_on_attackers_rows_alone():
    labels, attacker = np.array([0, 3, 9, 4]), np.array([1, 0, 1, 0])
    np.testing.assert_array_equal(flip_labels(labels, attacker, 10), [9, 3, 0, 4])
    np.testing.assert_array_equal(flip_labels(jnp.asarray(labels), attacker == 1, 10), [9, 3, 0, 4])
    assert flip_labels(labels.astype(np.int32), attacker, 10).dtype == np.int32


@pytest.mark.parametrize("attack", [SignFlip(10.0), GaussianUpload(10.0)])
def test_median_learns_where_the_mean_does_not(attack):
    errors = {}
    for aggregator in (Mean("uniform"), Median()):
        state, _ = run(attacked(attack, aggregator), rounds=40)
        errors[aggregator.name] = np.abs(state.params - np.array([1.0, -2.0])).max()
    assert errors["median"] < 0.05 < 1 < errors["averaging"] or not np.isfinite(errors["averaging"])


# ---- an attack that sees all uploads


def cohort(seed=4, clients=7):
    rng = np.random.default_rng(seed)
    x, weights, marks = rng.normal(size=(clients, 3)), np.array([1.0, 2, 0, 1, 3, 1, 0]), np.array([0, 1, 0, 0, 1, 0, 1])
    metrics = {name: jnp.asarray(weights) for name in ("examples", "steps", "loss")} | {"attacker": jnp.asarray(marks, float)}
    return x, weights, marks == 1, Upload({"w": jnp.asarray(x)}, {}, {}, metrics)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rule", [Mean("examples"), Median(), CentredClipping(0.4, by="examples")], ids=lambda rule: rule.name)
def test_a_little_is_enough(rule):
    """Attackers send the mean less z deviations of the honest who count; those left out stay out."""
    x, weights, attacks, uploads = cohort()
    info, state = CohortInfo(0, 7, 8.0, 5, 8.0), rule.init({"w": jnp.zeros(3)})
    found, _ = ALittleIsEnough(rule, 1.5).combine(uploads, jnp.asarray(weights), state, info)
    honest = x[~attacks & (weights > 0)]
    false = np.where((attacks & (weights > 0))[:, None], honest.mean(0) - 1.5 * honest.std(0), x)
    expected, _ = rule.combine(uploads._replace(delta={"w": jnp.asarray(false)}), jnp.asarray(weights), state, info)
    np.testing.assert_allclose(found.delta["w"], expected.delta["w"], rtol=1e-12)


def test_a_little_is_enough_in_rounds():
    """Lanes do not matter, the state of the aggregator goes on, and the mean goes astray."""
    ends = [run(attacked(None, ALittleIsEnough(CentredClipping(0.3), 1.0)), lanes=lanes)[0] for lanes in (1, 3)]
    np.testing.assert_allclose(ends[0].params, ends[1].params, rtol=1e-6)
    assert np.asarray(ends[0].aggregator).any()


def test_sum_rules_under_attack_keep_their_weights():
    """With z = 0 and attackers that send the honest mean, the mean of all is that of the honest."""
    _, weights, attacks, uploads = cohort()
    rule, info = ALittleIsEnough(Mean("examples"), 0.0), CohortInfo(0, 7, 8.0, 5, 8.0)
    same = uploads._replace(delta={"w": jnp.ones((7, 3)) * (1.0 + jnp.asarray(attacks)[:, None])})
    np.testing.assert_allclose(rule.combine(same, jnp.asarray(weights), (), info)[0].delta["w"], np.ones(3), rtol=1e-6)
    assert rule.weigh({"examples": 4.0, "steps": 2.0}) == 4


def test_an_aggregator_under_attack_still_gets_what_it_reads():
    fair = jaxfed.qfedavg(loss, lrate=0.1, batch_size=2)
    under = fair.replace(client=Malicious(fair.client), aggregator=ALittleIsEnough(fair.aggregator))
    assert np.isfinite(run(under, rounds=1)[0].params).all()
    with pytest.raises(ValueError, match="start_loss"):
        under.replace(client=Malicious(HONEST.client))


@pytest.mark.parametrize(("clients", "attackers", "z"), [(50, 24, 1.426), (20, 4, 0.157), (5, 2, 0.431)])
def test_largest_shift(clients, attackers, z):
    """Quantiles of a normal table at 24/26, 9/16 and 2/3."""
    assert largest_shift(clients, attackers) == pytest.approx(z, abs=1e-3)


# ---- bad input


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: run(attacked(None), data=federation(marked=False)), "expected an array 'attacker' in the data.*, got x, y"),
        (lambda: run(HONEST.replace(aggregator=ALittleIsEnough(Krum(1)))), r"no metric 'attacker'.* Malicious\(client\)"),
        (lambda: largest_shift(10, 6), "attackers in a minority, got 6 of 10"),
        (lambda: largest_shift(10, -1), "attackers in a minority"),
        (lambda: SignFlip(0.0), "SignFlip.scale"),
        (lambda: Scaling(-1.0), "Scaling.scale"),
        (lambda: GaussianUpload(0.0), "GaussianUpload.std"),
    ],
)
def test_bad_input(call, text):
    with pytest.raises(ValueError, match=text):
        call()
