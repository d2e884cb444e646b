"""What privacy a run spends, and the noise that a budget asks for: by the accountants of ``dp-accounting``. Host side.

The mechanism is the Gaussian one on Poisson samples: clients that are drawn into cohorts (:class:`~jaxfed.PrivateMean`), or
rows into batches (:class:`~jaxfed.PrivateGradient`), each with the same probability, independently. Whatever is drawn otherwise
(a fixed number of clients, shuffled batches) is not covered by these figures. Install it with ``pip install 'jaxfed[privacy]'``.
"""

from typing import Any

from jaxfed import checks

ACCOUNTANTS = ("pld", "rdp")


def epsilon(*, noise_multiplier: float, sampling_rate: float, steps: int, delta: float, accountant: str = "pld") -> float:
    """The epsilon that so many steps spend at a given delta.

    Args:
        noise_multiplier: The noise's standard deviation over the greatest norm of a contribution, above 0.
        sampling_rate: The probability to be drawn, above 0 and at most 1.
        steps: Rounds (of clients), or local steps over all rounds (of rows).
        delta: Above 0 and below 1; usually below one over the number of clients or rows.
        accountant: ``"pld"`` (privacy loss distributions, tight) or ``"rdp"`` (Renyi, a little more).

    Raises:
        ImportError: Without the package ``dp-accounting``.
        ValueError: If a number is outside of its bounds.

    Example:
        >>> print(f"{epsilon(noise_multiplier=4.0, sampling_rate=0.01, steps=10_000, delta=1e-5, accountant='rdp'):.3f}")
        1.035
    """
    noise_multiplier = _checked("noise_multiplier", noise_multiplier, above=0)
    composed, fresh = _event(noise_multiplier, sampling_rate, steps), _accountant(accountant)
    return float(fresh().compose(composed).get_epsilon(_checked("delta", delta, above=0, below=1)))


def noise_multiplier(*, epsilon: float, sampling_rate: float, steps: int, delta: float, accountant: str = "pld") -> float:
    """The smallest noise multiplier with which so many steps spend no more than a budget. Arguments as in :func:`epsilon`.

    Example:
        >>> print(f"{noise_multiplier(epsilon=1.0, sampling_rate=1.0, steps=1, delta=1e-5):.2f}")
        3.73
    """
    budget, delta = _checked("epsilon", epsilon, above=0), _checked("delta", delta, above=0, below=1)
    fresh, library = _accountant(accountant), _library()
    found = library.calibrate_dp_mechanism(fresh, lambda noise: _event(noise, sampling_rate, steps), budget, delta)
    return float(found)


def _event(noise: float, rate: float, steps: int) -> Any:
    library, rate = _library(), _checked("sampling_rate", rate, above=0, at_most=1)
    steps = checks.count("steps", steps, checks.Bounds(at_least=1))
    return library.SelfComposedDpEvent(library.PoissonSampledDpEvent(rate, library.GaussianDpEvent(noise)), steps)


def _accountant(name: str) -> Any:
    checks.choice("accountant", name, ACCOUNTANTS)
    library = _library()
    return library.pld.PLDAccountant if name == "pld" else library.rdp.RdpAccountant


def _checked(where: str, value: float, **bounds: float) -> float:
    return checks.number(where, value, checks.Bounds(**bounds))


def _library() -> Any:
    try:
        import dp_accounting
    except ImportError:
        raise ImportError("Privacy is accounted by dp-accounting: pip install 'jaxfed[privacy]'.") from None
    return dp_accounting
