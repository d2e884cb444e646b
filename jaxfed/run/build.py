"""From a config to the things it names: data, model, algorithm, simulation. Errors begin with the path of a key."""

import contextlib
import hashlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed import checks, part
from jaxfed.algorithms import RECIPES, accepted_options, build_recipe
from jaxfed.base import Model
from jaxfed.client.local import LocalTraining
from jaxfed.data import datasets
from jaxfed.data.federated import FederatedData
from jaxfed.data.partition import PARTITIONS
from jaxfed.engine.algorithm import Algorithm
from jaxfed.messages import RunState
from jaxfed.optimizer.optimizer import Optimizer
from jaxfed.optimizer.rates import as_rate
from jaxfed.run import machines
from jaxfed.run.config import RunConfig
from jaxfed.run.section import known_keys, located
from jaxfed.simulation import Simulation

_COMPOSED = {"client": None, "server": 1.0, "batches": None, "aggregator": "averaging", "gradient": "mean"}
"""The keys of [algorithm] without a recipe and their defaults; None must be given."""


class Built(NamedTuple):
    """What a config names.

    Attributes:
        simulation: The algorithm on the training rows.
        test: The rows for evaluation; the training rows themselves where ``data.test_fraction`` is 0.
        valid: The rows by which a run stops and keeps its best model; None without ``data.valid_fraction``.
        digest: Identifies the data.
    """

    simulation: Simulation
    test: FederatedData
    valid: FederatedData | None
    digest: str


def build(config: RunConfig) -> Built:
    """Everything that a run needs.

    Raises:
        TypeError, ValueError, OSError: With the path of the key that is wrong.
    """
    whole = data(config)
    # The model sees the rows before the split: a label may be in the test rows alone.
    made = algorithm(config, model(config, whole))
    train, test, valid = split(config, whole)
    return Built(simulation(config, made, train), test, valid, digest_of_data(whole))


def resolved(config: RunConfig) -> RunConfig:
    """The config with the run's seed written out where data or partition need one, and paths made absolute."""
    table = config.to_dict()
    section = table["data"]
    if section["name"] in datasets.DATASETS:
        _fill_seed(section, datasets.DATASETS[section["name"]], config.run.seed)
    if isinstance(section.get("path"), str):
        section["path"] = str(Path(section["path"]).absolute())
    if config.data.partition is not None and config.data.partition.name in PARTITIONS:
        _fill_seed(section["partition"], PARTITIONS[config.data.partition.name], config.run.seed)
    return RunConfig.from_dict(table)


def data(config: RunConfig) -> FederatedData:
    """All rows of all clients; of several processes each has those of its own clients."""
    section, chosen = resolved(config).data, None
    with located("data.name"):
        checks.known_name("data set", section.name, datasets.DATASETS)
    own = _parameters(datasets.ARRAYS if section.partition else datasets.FEDERATIONS, section.name)
    if own is not None:
        known_keys("data", section.options, own)
    if section.partition is not None:
        with located("data.partition.name"):
            checks.known_name("partition", section.partition.name, PARTITIONS)
        known_keys("data.partition", section.partition.options, _parameters(PARTITIONS, section.partition.name) or ())
        chosen = (section.partition.name, section.partition.options)
    try:
        with located("data"):
            load = partial(datasets.load_shard, **machines.shard()) if jax.process_count() > 1 else datasets.load
            return load(section.name, partition=chosen, label_key=section.label_key, **section.options)
    except (TypeError, ValueError) as error:
        raise type(error)(_of_partition(str(error), chosen)) from error


def split(config: RunConfig, whole: FederatedData) -> tuple[FederatedData, FederatedData, FederatedData | None]:
    """Training, test and validation rows of every client; the test rows do not depend on whether there are validation rows.

    Raises:
        ValueError: If no client has a row to spare.
    """
    section, seed, train, test, valid = config.data, config.run.seed, whole, None, None
    if section.test_fraction:
        train, test = train.split(section.test_fraction, seed=seed)
        if test.num_examples == 0:
            remedy = "Deal them to fewer clients, or set 0 to evaluate on the training rows."
            raise ValueError(f"data.test_fraction: every client has one row, which leaves none for testing. {remedy}")
    if section.valid_fraction:
        # Another stream than that of the test rows.
        train, valid = train.split(section.valid_fraction, seed=(seed + 2**31) % 2**32)
        if valid.num_examples == 0:
            remedy = "Deal rows to fewer clients, or leave it out to watch the test rows."
            raise ValueError(
                f"data.valid_fraction: every client has one training row, which leaves none to validate on. {remedy}"
            )
    return train, train if test is None else test, valid


def model(config: RunConfig, whole: FederatedData) -> Model:
    """The reference model, made for these rows."""
    # Flax takes long to import, and not every command needs it.
    from jaxfed.models.reference import MODELS, build_model

    with located("model.name"):
        checks.known_name("model", config.model.name, MODELS)
    known_keys("model", config.model.options, _parameters(MODELS, config.model.name) or ())
    with located("model"):
        return build_model(config.model.name, _sample(whole), **config.model.options)


def algorithm(config: RunConfig, model: Model) -> Algorithm:
    """The recipe, or the parts put together."""
    section = config.algorithm
    made = _composed(section.options, model) if section.name is None else _recipe(section.name, section.options, model)
    # Parts take arrays of values to sweep over, which a single run cannot mean.
    for path, leaf in jax.tree_util.tree_leaves_with_path(made):
        name = checks.leaf_name(path)
        if jnp.ndim(leaf) and not name.startswith("client/loss"):
            raise ValueError(f"algorithm: {name}: expected one number, got {leaf.tolist()}. A run has one value of each.")
    return made


def simulation(config: RunConfig, algorithm: Algorithm, train: FederatedData) -> Simulation:
    """The simulation, whose lanes are chosen by itself unless given."""
    section = config.simulation
    selector = None
    if section.selector is not None:
        with located("simulation.selector"):
            selector = part.build("selector", section.selector, "simulation.selector")
    with located("simulation"):
        names = ("lanes", "devices", "chunk", "paged")
        return Simulation(algorithm, train, section.cohort_size, selector=selector, **{n: getattr(section, n) for n in names})


def check_round(simulation: Simulation, state: RunState) -> None:
    """Traces a round without running it: finds parts, model and data that do not fit together.

    Raises:
        TypeError, ValueError: What the parts say.
    """
    with located("algorithm"):
        simulation.trace(state)


def digest_of_data(data: FederatedData) -> str:
    """A digest of all rows and of whose they are: a run that is resumed must find the data with which it began.

    >>> rows = FederatedData.from_arrays({"y": [1, 2, 3]}, [0, 0, 1])
    >>> digest_of_data(rows) == digest_of_data(FederatedData.from_arrays({"y": [1, 2, 3]}, [0, 1, 1]))
    False
    """
    digest = hashlib.sha256(data.offsets.tobytes())
    for key, array in sorted(data.arrays.items()):
        digest.update(f"{key} {array.dtype} {array.shape[1:]}".encode())
    # Client by client, so that several processes, each of which has some of them, come to the same.
    own = np.frombuffer(b"".join(_digests_of_clients(data)), np.uint8).reshape(-1, hashlib.sha256().digest_size)
    digest.update(machines.everyones(own).data)
    return digest.hexdigest()


def _digests_of_clients(data: FederatedData) -> Iterator[bytes]:
    edges = (data.offsets[data.held.start : data.held.stop + 1] - data.offsets[data.held.start]).tolist()
    columns = [(x.reshape(-1).view("uint8").data, x.itemsize * math.prod(x.shape[1:])) for _, x in sorted(data.arrays.items())]
    for first, end in pairwise(edges):
        digest = hashlib.sha256()
        for content, width in columns:
            digest.update(content[first * width : end * width])
        yield digest.digest()


def _sample(data: FederatedData) -> dict[str, np.ndarray]:
    """All rows; of several processes a few of each, with the smallest and the largest of its whole numbers."""
    # Not by what is held: of a single client one process has all and the others nothing, and all must ask.
    if jax.process_count() == 1:
        return data.arrays
    whole = [x for x in data.arrays.values() if x.dtype.kind in "iu" and x.size]
    picked = [np.unravel_index(pick(x), x.shape)[0] for x in whole for pick in (np.argmin, np.argmax)]
    any_row = [0] if data.offsets[data.held.start] < data.offsets[data.held.stop] else []
    rows = np.unique(np.asarray(picked + any_row, np.int64))
    return {key: machines.everyones(x[rows]) for key, x in data.arrays.items()}


def _composed(options: Mapping[str, Any], model: Model) -> Algorithm:
    known_keys("algorithm", options, ("name", *_COMPOSED))
    for name in ("client", "batches"):
        if options.get(name) is None:
            raise ValueError(f"algorithm.{name} is missing. Without a name, [algorithm] needs client and batches.")
    chosen = {**_COMPOSED, **options}
    client, server = (_optimizer(f"algorithm.{side}", chosen[side]) for side in ("client", "server"))
    batches, aggregator, gradient = (_part(f"algorithm.{kind}", kind, chosen[kind]) for kind in list(_COMPOSED)[2:])
    with located("algorithm"):
        return Algorithm(LocalTraining(model, client, batches, gradient), server, aggregator)


def _recipe(name: str, options: Mapping[str, Any], model: Model) -> Algorithm:
    with located("algorithm.name"):
        checks.known_name("algorithm", name, RECIPES)
    known_keys("algorithm", options, accepted_options(RECIPES[name]))
    options = dict(options)
    for rate in ("lrate", "server_lrate"):
        if rate in options:
            options[rate] = _optimizer(f"algorithm.{rate}", options[rate])
    for needed in ("lrate", "batch_size"):
        if needed not in options:
            hint = ' (in TOML "none" takes all rows at once)' if needed == "batch_size" else ""
            raise ValueError(f"algorithm.{needed} is missing; {name} needs it{hint}.")
    try:
        return build_recipe(name, model, **options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{_culprit(name, model, options)}: {error}") from error


def _optimizer(path: str, value: Any) -> Optimizer:
    """From a rate, or from a table of an Optimizer's options."""
    names = [*Optimizer.__dataclass_fields__, *Optimizer.aliases]  # type: ignore[attr-defined]
    if not isinstance(value, Mapping) or not any(name in value for name in names):
        with located(path):
            return Optimizer(as_rate(path, value))
    known_keys(path, value, names)
    options = {Optimizer.aliases.get(name, name): one for name, one in value.items()}
    for name in [name for name in ("lrate", "w_decay") if name in options]:
        with located(f"{path}.{name}"):
            options[name] = as_rate(f"{path}.{name}", options[name])
    for name, kind in (("regularizers", "regularizer"), ("modules", "module")):
        if isinstance(options.get(name), list):
            options[name] = [_part(f"{path}.{name}[{i}]", kind, one) for i, one in enumerate(options[name])]
    with located(path):
        return Optimizer.from_config(options)


def _part(path: str, kind: str, value: Any) -> Any:
    with located(path):
        return part.build(kind, value, path)


def _culprit(name: str, model: Model, options: dict[str, Any]) -> str:
    """The path of the option without which the recipe can be built."""
    for option in options:
        rest = {key: one for key, one in options.items() if key != option}
        # A recipe's option reaches its part under another name (mu is FedProx.alpha), so the part's error cannot say.
        with contextlib.suppress(TypeError, ValueError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            build_recipe(name, model, **({"lrate": 1.0, "batch_size": 1} | rest))
            return f"algorithm.{option}"
    return "algorithm"


def _parameters(functions: Mapping[str, Callable], name: str) -> list[str] | None:
    if name not in functions:
        return None
    return [p for p in inspect.signature(functions[name]).parameters if p not in ("sample", "labels")]


def _fill_seed(table: dict[str, Any], function: Callable, seed: int) -> None:
    if "seed" in inspect.signature(function).parameters:
        table.setdefault("seed", seed)


def _of_partition(message: str, chosen: tuple[str, Mapping] | None) -> str:
    """``data.alpha: ...`` said by a partition is ``data.partition.alpha: ...``."""
    key = message.split(":")[0].removeprefix("data.")
    return message.replace("data.", "data.partition.", 1) if chosen and key in chosen[1] else message
