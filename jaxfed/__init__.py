"""jaxfed: a compiled JAX optimizer core for federated learning.

The names below come in the order of a round. Importing this loads neither flax nor orbax: models are in ``jaxfed.models``, files
and the command in ``jaxfed.run``.
"""

from jaxfed import attacks, trees
from jaxfed.algorithms import (
    adaalter,
    build_recipe,
    dpfedavg,
    fedadagrad,
    fedadam,
    fedavg,
    fedavgm,
    fedbuff,
    fedprox,
    fedyogi,
    scaffold,
)
from jaxfed.algorithms_corrected import afl, feddyn, fednova, mime, mimelite, qfedavg
from jaxfed.algorithms_personal import apfl, ditto, fedbn, fedem, fedper, fedrep, finetuned, pfedme
from jaxfed.base import Aggregator, ClientUpdate, Model, OptiModule, Regularizer, Selector
from jaxfed.client.batches import ClientRows, Epochs, Poisson, Steps
from jaxfed.client.gradients import SVRG, MeanGradient
from jaxfed.client.local import LocalTraining
from jaxfed.client.precision import HalfPrecision
from jaxfed.client.privacy import PrivateGradient
from jaxfed.client.surveys import FullGradient
from jaxfed.data.federated import FederatedData
from jaxfed.differentiable import differentiable_rounds
from jaxfed.engine.algorithm import Algorithm
from jaxfed.messages import Broadcast, Cohort, CohortInfo, RoundStart, RunState, Upload
from jaxfed.optimizer.adaptive import Adagrad, Adam, RMSProp, Yogi
from jaxfed.optimizer.clipping import L2Clipping, L2GlobalClipping
from jaxfed.optimizer.feddyn import FedDynClient, FedDynServer
from jaxfed.optimizer.foreign import FromOptax
from jaxfed.optimizer.mime import MimeAdam, MimeClient, MimeServer
from jaxfed.optimizer.momentum import EWMA, Momentum, YogiMomentum
from jaxfed.optimizer.noise import GaussianNoise, LaplaceNoise
from jaxfed.optimizer.optimizer import Optimizer, list_optim_modules, list_optim_regularizers, list_rate_schedulers
from jaxfed.optimizer.paired import AdaAlterClient, AdaAlterServer, ScaffoldClient, ScaffoldServer
from jaxfed.optimizer.rates import ByLabel, Schedule
from jaxfed.optimizer.regularizers import FedProx, Lasso, Ridge
from jaxfed.optimizer.schedules import (
    CosineAnnealing,
    CosineAnnealingWarmRestarts,
    CyclicExpRange,
    CyclicTriangular,
    ExponentialDecay,
    InverseScaling,
    LinearDecay,
    PiecewiseDecay,
    PolynomialDecay,
    Warmup,
    WarmupRounds,
)
from jaxfed.part import Part, count, number, size, static
from jaxfed.personal.apfl import APFL
from jaxfed.personal.ditto import Ditto
from jaxfed.personal.fedem import FedEM, stacked_starts
from jaxfed.personal.finetune import Finetuned
from jaxfed.personal.partial import LocalLeaves, norm_layers
from jaxfed.personal.pfedme import PFedMe
from jaxfed.profiling import Profile, profile_rounds
from jaxfed.reports import Evaluation, History, RoundReport
from jaxfed.server.aggregators import GradientMaskedMean, Mean, Sum, list_aggregators
from jaxfed.server.asynchronous import Asynchronous, Buffered
from jaxfed.server.clock import Availability, FirstToFinish, Windows, completion_seconds
from jaxfed.server.fair import Agnostic, QFair
from jaxfed.server.geometric import Bulyan, CentredClipping, GeometricMedian, Krum
from jaxfed.server.normalized import FedNova
from jaxfed.server.oort import Oort
from jaxfed.server.private import AdaptivePrivateMean, PrivateMean
from jaxfed.server.ranking import Composition, Criterion, Weighted
from jaxfed.server.robust import Median, NormBound, TrimmedMean
from jaxfed.server.selection import Everyone, PoissonSampling, Ranked, Stragglers, Uniform
from jaxfed.simulation import Simulation
from jaxfed.stopping import BestModel, EarlyStopping
from jaxfed.sweep import Sweep, sweep

__all__ = [
    "APFL",
    "EWMA",
    "SVRG",
    "AdaAlterClient",
    "AdaAlterServer",
    "Adagrad",
    "Adam",
    "AdaptivePrivateMean",
    "Aggregator",
    "Agnostic",
    "Algorithm",
    "Asynchronous",
    "Availability",
    "BestModel",
    "Broadcast",
    "Buffered",
    "Bulyan",
    "ByLabel",
    "CentredClipping",
    "ClientRows",
    "ClientUpdate",
    "Cohort",
    "CohortInfo",
    "Composition",
    "CosineAnnealing",
    "CosineAnnealingWarmRestarts",
    "Criterion",
    "CyclicExpRange",
    "CyclicTriangular",
    "Ditto",
    "EarlyStopping",
    "Epochs",
    "Evaluation",
    "Everyone",
    "ExponentialDecay",
    "FedDynClient",
    "FedDynServer",
    "FedEM",
    "FedNova",
    "FedProx",
    "FederatedData",
    "Finetuned",
    "FirstToFinish",
    "FromOptax",
    "FullGradient",
    "GaussianNoise",
    "GeometricMedian",
    "GradientMaskedMean",
    "HalfPrecision",
    "History",
    "InverseScaling",
    "Krum",
    "L2Clipping",
    "L2GlobalClipping",
    "LaplaceNoise",
    "Lasso",
    "LinearDecay",
    "LocalLeaves",
    "LocalTraining",
    "Mean",
    "MeanGradient",
    "Median",
    "MimeAdam",
    "MimeClient",
    "MimeServer",
    "Model",
    "Momentum",
    "NormBound",
    "Oort",
    "OptiModule",
    "Optimizer",
    "PFedMe",
    "Part",
    "PiecewiseDecay",
    "Poisson",
    "PoissonSampling",
    "PolynomialDecay",
    "PrivateGradient",
    "PrivateMean",
    "Profile",
    "QFair",
    "RMSProp",
    "Ranked",
    "Regularizer",
    "Ridge",
    "RoundReport",
    "RoundStart",
    "RunState",
    "ScaffoldClient",
    "ScaffoldServer",
    "Schedule",
    "Selector",
    "Simulation",
    "Steps",
    "Stragglers",
    "Sum",
    "Sweep",
    "TrimmedMean",
    "Uniform",
    "Upload",
    "Warmup",
    "WarmupRounds",
    "Weighted",
    "Windows",
    "Yogi",
    "YogiMomentum",
    "adaalter",
    "afl",
    "apfl",
    "attacks",
    "build_recipe",
    "completion_seconds",
    "count",
    "differentiable_rounds",
    "ditto",
    "dpfedavg",
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedavgm",
    "fedbn",
    "fedbuff",
    "feddyn",
    "fedem",
    "fednova",
    "fedper",
    "fedprox",
    "fedrep",
    "fedyogi",
    "finetuned",
    "list_aggregators",
    "list_optim_modules",
    "list_optim_regularizers",
    "list_rate_schedulers",
    "mime",
    "mimelite",
    "norm_layers",
    "number",
    "pfedme",
    "profile_rounds",
    "qfedavg",
    "scaffold",
    "size",
    "stacked_starts",
    "static",
    "sweep",
    "trees",
]

__version__ = "0.1.0"
