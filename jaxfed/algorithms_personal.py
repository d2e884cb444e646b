"""Recipes of personalised algorithms: each client ends with a model, layers or a mixture of its own.

Evaluate them with ``Simulation.evaluate_personal``. They share the options of :func:`~jaxfed.algorithms.fedavg`.
"""

from typing import Any

from jaxfed.algorithms import RECIPES, fedavg, local_work
from jaxfed.engine.algorithm import Algorithm
from jaxfed.optimizer.optimizer import as_optimizer
from jaxfed.personal.apfl import APFL
from jaxfed.personal.ditto import Ditto
from jaxfed.personal.fedem import FedEM
from jaxfed.personal.finetune import Finetuned
from jaxfed.personal.partial import LocalLeaves, norm_layers
from jaxfed.personal.pfedme import PFedMe
from jaxfed.personal.wrapper import training_of


def fedbn(loss: Any, *, leaves: Any = None, **options: Any) -> Algorithm:
    """FedAvg whose normalisation layers stay with the clients, their statistics included.

    Args:
        loss: As in :func:`fedavg`.
        leaves: Which leaves stay: patterns over names, or a function of a name; None takes :func:`norm_layers`.
        **options: As in :func:`fedavg`.

    References:
        Li et al., `FedBN: Federated Learning on Non-IID Features via Local Batch Normalization
        <https://arxiv.org/abs/2102.07623>`_, 2021
    """
    algorithm = fedavg(loss, **options)
    leaves = norm_layers if leaves is None else leaves
    return algorithm.replace(client=LocalLeaves(training_of(algorithm.client), leaves, statistics=True))


def fedper(loss: Any, *, leaves: Any = "head/*", **options: Any) -> Algorithm:
    """FedAvg whose head stays with the clients, trained jointly with the shared body.

    Args:
        loss: As in :func:`fedavg`.
        leaves: The head: patterns over the names of leaves, or a function of a name.
        **options: As in :func:`fedavg`.

    References:
        Arivazhagan et al., `Federated Learning with Personalization Layers <https://arxiv.org/abs/1912.00818>`_, 2019
    """
    algorithm = fedavg(loss, **options)
    return algorithm.replace(client=LocalLeaves(training_of(algorithm.client), leaves))


def fedrep(
    loss: Any,
    *,
    leaves: Any = "head/*",
    head_lrate: Any = None,
    head_epochs: int | None = None,
    head_steps: int | None = None,
    **options: Any,
) -> Algorithm:
    """FedAvg of the body; the head stays with the clients, trained before the body in each round (10 epochs in the paper).

    Args:
        loss: As in :func:`fedavg`.
        leaves: The head: patterns over the names of leaves, or a function of a name.
        head_lrate: The head's learning rate or Optimizer; None takes ``lrate``.
        head_epochs: Passes for the head (10 unless ``head_steps`` is given).
        head_steps: Steps for the head, instead of ``head_epochs``.
        **options: As in :func:`fedavg`; they are the body's.

    References:
        Collins et al., `Exploiting Shared Representations for Personalized FL <https://arxiv.org/abs/2102.07078>`_, 2021
    """
    algorithm = fedavg(loss, **options)
    head_epochs = 10 if head_epochs is None and head_steps is None else head_epochs
    work = local_work(options["batch_size"], head_epochs, head_steps)
    body = training_of(algorithm.client)
    optimizer = body.optimizer if head_lrate is None else as_optimizer("head_lrate", head_lrate)
    head = body.replace(optimizer=optimizer, batches=work)
    return algorithm.replace(client=LocalLeaves(body, leaves, head=head))


def ditto(loss: Any, *, strength: float = 0.1, personal_lrate: Any = None, **options: Any) -> Algorithm:
    """FedAvg, and beside it a personal model for each client, pulled towards the global one.

    Args:
        loss: As in :func:`fedavg`.
        strength: The pull, lambda; the paper tries 0.05 to 2.
        personal_lrate: The personal model's learning rate or Optimizer; None takes ``lrate``.
        **options: As in :func:`fedavg`.

    References:
        Li et al., `Ditto: Fair and Robust Federated Learning Through Personalization <https://arxiv.org/abs/2012.04221>`_, 2021
    """
    algorithm = fedavg(loss, **options)
    return algorithm.replace(client=Ditto(algorithm.client, personal_lrate, strength))


def pfedme(loss: Any, *, strength: float = 15.0, inner_steps: int = 5, personal_lrate: Any = None, **options: Any) -> Algorithm:
    """Personal models as Moreau envelopes; ``server_lrate`` is the paper's beta.

    Args:
        loss: As in :func:`fedavg`.
        strength: The pull, lambda.
        inner_steps: Steps of the personal model on each batch.
        personal_lrate: Its learning rate or Optimizer; None takes ``lrate``.
        **options: As in :func:`fedavg`; ``lrate`` is that of the weights that travel.

    References:
        Dinh et al., `Personalized Federated Learning with Moreau Envelopes <https://arxiv.org/abs/2006.08848>`_, 2020
    """
    algorithm = fedavg(loss, **options)
    outer = training_of(algorithm.client)
    inner = outer.optimizer if personal_lrate is None else as_optimizer("personal_lrate", personal_lrate)
    return algorithm.replace(
        client=PFedMe(outer.loss, outer.optimizer, inner, outer.batches, strength, inner_steps, gradient=outer.gradient)
    )


def fedem(loss: Any, *, models: int = 3, **options: Any) -> Algorithm:
    """A mixture of ``models`` models, of which each client learns its own weights.

    Args:
        loss: A Model whose ``predict`` gives logits ``[B, ..., classes]``.
        models: How many.
        **options: As in :func:`fedavg`.

    References:
        Marfoq et al., `Federated Multi-Task Learning under a Mixture of Distributions <https://arxiv.org/abs/2108.10252>`_, 2021
    """
    algorithm = fedavg(loss, **options)
    one = training_of(algorithm.client)
    return algorithm.replace(client=FedEM(loss, one.optimizer, one.batches, models, gradient=one.gradient))


def apfl(loss: Any, *, alpha: float = 0.5, alpha_lrate: float = 0.0, personal_lrate: Any = None, **options: Any) -> Algorithm:
    """FedAvg, and for each client weights of its own that are mixed with the global ones.

    Args:
        loss: As in :func:`fedavg`.
        alpha: The share of a client's own weights, 0 to 1.
        alpha_lrate: The rate at which clients adapt their ``alpha``; 0 leaves it.
        personal_lrate: The learning rate or Optimizer of a client's own weights; None takes ``lrate``.
        **options: As in :func:`fedavg`.

    References:
        Deng et al., `Adaptive Personalized Federated Learning <https://arxiv.org/abs/2003.13461>`_, 2020
    """
    algorithm = fedavg(loss, **options)
    return algorithm.replace(client=APFL(training_of(algorithm.client), alpha, alpha_lrate, personal_lrate))


def finetuned(
    loss: Any,
    *,
    finetune_lrate: Any = None,
    finetune_epochs: int | None = None,
    finetune_steps: int | None = None,
    **options: Any,
) -> Algorithm:
    """FedAvg; to predict, each client first trains the global model on its own rows.

    Args:
        loss: As in :func:`fedavg`.
        finetune_lrate: The learning rate or Optimizer of fine-tuning; None takes ``lrate``.
        finetune_epochs: Passes of fine-tuning (1 unless ``finetune_steps`` is given).
        finetune_steps: Steps of fine-tuning, instead of ``finetune_epochs``.
        **options: As in :func:`fedavg`.

    References:
        Yu et al., `Salvaging Federated Learning by Local Adaptation <https://arxiv.org/abs/2002.04758>`_, 2020
    """
    algorithm = fedavg(loss, **options)
    work = local_work(options["batch_size"], finetune_epochs, finetune_steps)
    return algorithm.replace(client=Finetuned(algorithm.client, finetune_lrate, work))


PERSONAL_RECIPES = {recipe.__name__: recipe for recipe in (fedbn, fedper, fedrep, ditto, pfedme, fedem, apfl, finetuned)}
"""The recipes of this page by name; they are among :data:`~jaxfed.algorithms.RECIPES`, too."""

RECIPES.update(PERSONAL_RECIPES)
