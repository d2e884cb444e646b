"""What limits a run, from where its time goes: the largest share, in one sentence with a remedy. Host side."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxfed.engine.cohort import deal
from jaxfed.reports import RoundReport

# Near enough to the measured peak that nothing but fewer operations or more devices would help.
_NEAR = 0.4
# A local step below this time is mostly the starting of its operations.
_SHORT = 1e-3
# What fits here is hardly read from memory.
_CACHE, _CACHES = 32 * 2**20, {"cpu": 4 * 2**20}


class Work(NamedTuple):
    """Local steps of a round, as they are dealt to devices and lanes; means over the rounds.

    Attributes:
        steps: What all clients do together.
        longest: How many one after the other on the device that has most: a wave of lanes lasts as long as its longest client.
        mean: The same, as the mean over devices.
        executed: Steps that the lanes go through, with those in which a lane waits for the longest of its wave.
    """

    steps: float
    longest: float
    mean: float
    executed: float

    @property
    def imbalance(self) -> float:
        """The largest number of steps of a device over the mean of all devices; 1 if all are equal."""
        return self.longest / self.mean if self.mean else 1.0

    @property
    def used(self) -> float:
        """The share of the lanes' steps that train a client."""
        return self.steps / self.executed if self.executed else 1.0


def work_of(reports: list[RoundReport], devices: int, lanes: int) -> Work:
    """How the local steps of some rounds were dealt, from the metric ``steps`` of every client.

    Args:
        reports: Of the rounds.
        devices: How many devices share a cohort.
        lanes: ``L`` on each device.

    >>> report = RoundReport(1, np.arange(3), np.ones(3, bool), {"steps": np.array([2.0, 6.0, 4.0])}, 0.0)
    >>> work_of([report], devices=2, lanes=1)
    Work(steps=12.0, longest=6.0, mean=6.0, executed=12.0)
    >>> work_of([report], devices=1, lanes=3)
    Work(steps=12.0, longest=6.0, mean=6.0, executed=18.0)
    """
    found = []
    for report in reports:
        steps = np.asarray(report.metrics["steps"], float)
        deck, _ = deal(jnp.asarray(steps), jnp.asarray(len(steps)), devices, lanes)
        by_device = np.append(steps, 0.0)[np.asarray(deck)].max(2, initial=0.0).sum(1)
        found.append((steps.sum(), by_device.max(), by_device.mean(), lanes * by_device.sum()))
    return Work(*np.mean(found, 0).tolist())


class Shares(NamedTuple):
    """What the sentence is made of.

    Attributes:
        seconds: Of a round, by part: ``local steps``, ``selection and aggregation``, ``server step``, ``call``, ``host``.
        once: Seconds for each round of what is not done in every round: ``compile``, ``placing``, ``evaluation``.
        work: The local steps.
        flops_fraction: Achieved arithmetic of the local steps over the peak.
        bytes_fraction: Achieved memory traffic of the local steps over the peak.
        working_set: Bytes that a local step touches.
        paged: Whether data stay on the host.
    """

    seconds: dict[str, float]
    once: dict[str, float]
    work: Work
    flops_fraction: float
    bytes_fraction: float
    working_set: float
    paged: bool


def sentence_of(shares: Shares) -> str:
    """What takes the largest share of a run's time, how large it is, and what would help."""
    losses = _losses(shares)
    name = max(losses, key=lambda name: losses[name])
    share = losses[name] / max(sum(losses.values()), 1e-12)
    return f"{_SENTENCES[name].format(share=f'{share:.0%}', **_numbers(shares))}"


def _losses(shares: Shares) -> dict[str, float]:
    """Seconds of each round by what they are lost to."""
    seconds, work = shares.seconds, shares.work
    local = seconds["local steps"]
    imbalance = local * (1 - 1 / work.imbalance)
    waiting = (local - imbalance) * (1 - work.used)
    return {
        _kind_of_work(shares): local - imbalance - waiting,
        "imbalance": imbalance,
        "lanes": waiting,
        "aggregation": seconds["selection and aggregation"],
        "server": seconds["server step"],
        "calls": seconds["call"] + (0.0 if shares.paged else seconds["host"]),
        "travel": seconds["host"] if shares.paged else 0.0,
        **shares.once,
    }


def _kind_of_work(shares: Shares) -> str:
    """What the local steps are: arithmetic or memory near the peak, short, or slow."""
    cached = shares.working_set <= _CACHES.get(jax.default_backend(), _CACHE)
    memory = 0.0 if cached else shares.bytes_fraction
    if max(shares.flops_fraction, memory) >= _NEAR:
        return "arithmetic" if shares.flops_fraction >= memory else "memory"
    return "short steps" if _seconds_per_step(shares) < _SHORT else "slow operations"


def _seconds_per_step(shares: Shares) -> float:
    return shares.seconds["local steps"] / max(shares.work.longest, 1.0)


def _numbers(shares: Shares) -> dict[str, str]:
    return {
        "step": f"{1e6 * _seconds_per_step(shares):.0f} microseconds",
        "flops": f"{shares.flops_fraction:.0%}",
        "bytes": f"{shares.bytes_fraction:.0%}",
        "imbalance": f"{shares.work.imbalance:.2f}",
        "used": f"{shares.work.used:.0%}",
    }


_SENTENCES = {
    "arithmetic": (
        "Arithmetic limits a round: local steps take {share} of its time and reach {flops} of the measured peak; "
        "more devices, a smaller model or bfloat16 would help."
    ),
    "memory": (
        "Memory traffic limits a round: local steps take {share} of its time and reach {bytes} of the measured copy; "
        "larger batches, fewer lanes, bfloat16 or more devices would help."
    ),
    "short steps": (
        "The overhead of many small operations limits a round: local steps take {share} of its time, {step} each, at {flops} of "
        "the measured peak; more lanes, larger batches or a model with fewer, larger layers would help."
    ),
    "slow operations": (
        "Slow operations limit a round: local steps take {share} of its time, {step} each, at {flops} of the measured peak; the "
        "layers of jaxfed.models, larger batches or more lanes would help."
    ),
    "imbalance": (
        "Waiting for the longest clients limits a round: {share} of its time, since one device has {imbalance} times the mean of "
        "all; larger cohorts, fewer lanes, fewer devices or a fixed number of local steps would help."
    ),
    "lanes": (
        "Waiting lanes limit a round: {share} of its time, since {used} of the lanes' steps train a client; fewer lanes, larger "
        "cohorts or a fixed number of local steps would help."
    ),
    "aggregation": (
        "Selection and aggregation limit a round: {share} of its time; more local steps between rounds, fewer and longer "
        "clients, an aggregator that is a sum or more devices would help."
    ),
    "server": (
        "The server's step limits a round: {share} of its time; more devices, which share it, more local steps between rounds or "
        "a simpler server Optimizer would help."
    ),
    "calls": (
        "The host between compiled calls limits a round: {share} of its time; a larger chunk, or more local work in each round, "
        "would help."
    ),
    "travel": (
        "Data travelling from the host limit a round: {share} of its time; more local steps for each row, smaller rows, or "
        "paged=False where memory allows would help."
    ),
    "compile": (
        "Compiling limits this run: {share} of its time; more rounds, or a cache of compiled programs "
        "(jax_compilation_cache_dir, which the command sets), would help."
    ),
    "placing": (
        "Placing the data on the devices limits this run: {share} of its time; more rounds, smaller rows or paged=True would "
        "help."
    ),
    "evaluation": (
        "Evaluation limits this run: {share} of its time; a larger eval_every or fewer rows to evaluate on would help."
    ),
}
