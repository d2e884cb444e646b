"""Which aggregators withstand which attacks: 20 unlike clients with handwritten digits, of which four attack.

Robustness has a price where nobody attacks: rules that discard clients discard the labels that only those hold.

Run:  python examples/robust.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxfed
from jaxfed import attacks
from jaxfed.data import digits, dirichlet_by_label

CLIENTS, ATTACKERS = 20, 4
RULES = {
    "mean": jaxfed.Mean("uniform"),
    "norm bound": jaxfed.NormBound(max_norm=0.5),
    "centred clipping": jaxfed.CentredClipping(radius=0.2),
    "median": jaxfed.Median(),
    "geometric median": jaxfed.GeometricMedian(),
    "krum": jaxfed.Krum(ATTACKERS),
    "bulyan": jaxfed.Bulyan(ATTACKERS),
}
ATTACKS = {
    "none": None,
    "label flip": None,
    "sign flip": attacks.SignFlip(10.0),
    "a little": None,
}


def loss(params, batch, key):
    """Softmax regression."""
    logits = batch["x"] @ params["kernel"] + params["bias"]
    values = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return values, {"accuracy": logits.argmax(-1) == batch["y"]}


def accuracy(rule: str, attack: str, rounds: int) -> float:
    """On honest test rows, after training under attack."""
    arrays = digits()
    owners = dirichlet_by_label(arrays["y"], clients=CLIENTS, alpha=0.5, min_size=5, seed=0)
    attacker = owners < (0 if attack == "none" else ATTACKERS)
    train, test = jaxfed.FederatedData.from_arrays(arrays | {"attacker": attacker}, owners).split(0.2, seed=0)
    if attack == "label flip":
        rows = train.arrays
        rows["y"] = attacks.flip_labels(rows["y"], rows["attacker"], classes=10)
        train = jaxfed.FederatedData.from_arrays(rows, train.client_of_row)

    aggregator = RULES[rule]
    if attack == "a little":
        aggregator = attacks.ALittleIsEnough(aggregator, z=1.5)
    algorithm = jaxfed.fedavg(loss, lrate=0.5, batch_size=10)
    client = attacks.Malicious(algorithm.client, ATTACKS[attack])
    simulation = jaxfed.Simulation(algorithm.replace(client=client, aggregator=aggregator), train)

    params = {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
    state, _ = simulation.run(simulation.init(params, key=jax.random.key(0)), rounds=rounds)
    return simulation.evaluate(state, test).metrics["accuracy"]


def main(rules: tuple[str, ...] = tuple(RULES), kinds: tuple[str, ...] = tuple(ATTACKS), rounds: int = 30) -> np.ndarray:
    """Prints a table of test accuracies and returns it, ``[rules, attacks]``."""
    print(" " * 17 + "".join(f"{kind:>12s}" for kind in kinds))
    table = np.zeros((len(rules), len(kinds)))
    for i, rule in enumerate(rules):
        table[i] = [accuracy(rule, kind, rounds) for kind in kinds]
        print(f"{rule:17s}" + "".join(f"{value:12.3f}" for value in table[i]))
    return table


if __name__ == "__main__":
    main()
