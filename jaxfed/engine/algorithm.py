"""Algorithm: a choice of parts, checked when it is made."""

import warnings
from typing import Any, ClassVar

import jax

from jaxfed import part
from jaxfed.base import Aggregator, ClientUpdate, Selector
from jaxfed.client.surveys import Survey
from jaxfed.messages import Broadcast, Params, Stats
from jaxfed.optimizer.optimizer import Optimizer, as_optimizer
from jaxfed.part import Part
from jaxfed.server.aggregators import Mean


class Algorithm(Part, kind="algorithm"):
    """What clients do, how their uploads are added up, and the server's Optimizer.

    Args:
        client: What a client does with a broadcast.
        server: The server's Optimizer, or its learning rate.
        aggregator: How uploads become one pseudo-gradient.
        survey: A first pass over the same cohort, whose result joins the broadcast; usually None.

    Raises:
        ValueError: If an auxiliary variable lacks its other half, a metric its measure, or a gradient its survey.
        TypeError: If the survey cannot ask such a client.

    Warns:
        UserWarning: For a composition that runs but does not do what its name promises.
    """

    name: ClassVar[str] = "algorithm"
    client: ClientUpdate = part.part("client")
    server: Optimizer = part.field(as_optimizer, default=1.0)
    aggregator: Aggregator = part.part("aggregator", default=Mean())
    survey: Survey | None = part.part("survey", default=None, optional=True)

    def check(self) -> None:
        """Finds halves without the other half, and compositions without a meaning."""
        client = {m.aux_name: m for optimizer in self.client.optimizers for m in optimizer.parts if m.aux_name}
        server = {m.aux_name: m for m in self.server.parts if m.aux_name}
        _refuse_lone_halves("client", client, "server", server)
        _refuse_lone_halves("server", server, "client", client)
        _refuse_missing(self.client, self.aggregator, self.survey)
        if self.aggregator.stacks:
            _refuse_sums(self.aggregator, self.client.aux_reductions)
        for regularizer in self.server.regularizers:
            text = "it pulls towards the weights that the round began with, which are the server's own"
            warnings.warn(f"The server's Optimizer has the regularizer {regularizer.name!r}: {text}.", stacklevel=4)
        for optimizer in self.client.optimizers:
            for module in optimizer.parts:
                if advice := module.advice(optimizer):
                    warnings.warn(advice, stacklevel=4)

    def kept_row(self, params: Params, stats: Stats, key: jax.Array) -> Any:
        """What one client keeps, as shapes and dtypes: those of what it keeps after the first broadcast."""

        def first(params: Params, stats: Stats, key: jax.Array) -> Any:
            server = self.server.start_server(self.client.shared(params), key)
            return self.client.init_kept(Broadcast(params, stats, self.server.send(server), 0), key)

        return jax.eval_shape(first, params, stats, key)


def check_selection(algorithm: Algorithm, selector: Selector) -> None:
    """Raises ValueError if a selector reads what clients do not send, or cannot select for an algorithm."""
    _refuse_unmeasured(algorithm.client, selector)
    if selector.versions > 1 and algorithm.survey is not None:
        what = f"The selector {selector.name!r} lets clients begin in other rounds than they end in"
        raise ValueError(f"{what}, but the algorithm asks a whole cohort before its round. Use another algorithm or selector.")


def _refuse_unmeasured(client: ClientUpdate, reader: Aggregator | Selector) -> None:
    if missing := [name for name in reader.reads if name not in client.measured]:
        what = f"The {reader.kind} {reader.name!r} reads the metrics {missing}, which the client does not send"
        raise ValueError(f"{what}. Build the client with measures={missing}: recipes and LocalTraining take them.")


def _refuse_missing(client: ClientUpdate, aggregator: Aggregator, survey: Survey | None) -> None:
    _refuse_unmeasured(client, aggregator)
    if survey is not None:
        survey.check_client(client)
    elif client.needs_survey:
        raise ValueError("The client's gradient needs a first pass over the cohort. Build the algorithm with a survey.")


def _refuse_sums(aggregator: Aggregator, reductions: dict[str, Any]) -> None:
    for name, how in reductions.items():
        if "sum" in ([how] if isinstance(how, str) else how.values()):
            what = f"The aggregator {aggregator.name!r} replaces means over clients"
            raise ValueError(
                f"{what}, but the auxiliary variable {name!r} is a sum. Use an aggregator that is a sum, or another module."
            )


def _refuse_lone_halves(here: str, mine: dict[str, Any], there: str, others: dict[str, Any]) -> None:
    for name, module in mine.items():
        if name not in others:
            what = f"The {here} has {module.name!r}, which exchanges the auxiliary variable {name!r}"
            raise ValueError(f"{what}, but no module of the {there} does. Give the {there}'s Optimizer its other half.")
