"""Whether jaxfed and plain JAX agree:  ``benchmarks/.venvs/jaxfed/bin/python benchmarks/agree.py [--workloads W1,W2,W3]``.

Both train 4 rounds of FedAvg with batches in the order of the data; the losses must be equal to 4 decimals, and equal to those
that were found when the workloads were made. The exit status is 1 where they are not.
"""

import argparse
import json
import subprocess
import sys

from setup import HERE, interpreter, is_ready

# Data of other checksums may lead elsewhere: where NumPy draws otherwise.
EXPECTED = {
    "W1": ("9197cb08b9c7a4b5", 2.2422),
    "W2": ("01f8e9bd765bc510", 4.0719),
    "W3": ("8dfef10cfcf6b803", 4.4055),
}


def line_of(environment: str, module: str, workload: str) -> dict:
    """The result of 4 unshuffled rounds in a process of its own."""
    options = ["--workload", workload, "--rounds", "4", "--shuffle", "0"]
    command = [str(interpreter(environment)), "-m", f"peers.{module}", *options]
    output = subprocess.run(command, cwd=HERE, check=True, capture_output=True, text=True).stdout
    return json.loads(next(line for line in output.splitlines() if line.startswith('{"peer"')))


def agrees(workload: str) -> bool:
    """Runs both and says what came."""
    ours, plain = line_of("jaxfed", "jaxfed_rounds", workload), line_of("plain_jax", "plain_jax", workload)
    data, expected = EXPECTED[workload]
    targets = {"plain JAX": plain["loss"]}
    if ours["data"] == data:
        targets["expected"] = expected
    # Half a unit of the fourth decimal, and what rounding to five has added.
    good = all(abs(ours["loss"] - target) <= 6e-5 for target in targets.values())
    said = ", ".join(f"{name} {target:.5f}" for name, target in targets.items())
    print(f"{workload}: jaxfed {ours['loss']:.5f}, {said}: {'equal' if good else 'DIFFERENT'}", flush=True)
    return good


def main() -> None:
    """Compares the workloads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(EXPECTED))
    workloads = parser.parse_args().workloads.split(",")
    if missing := [name for name in ("jaxfed", "plain_jax") if not is_ready(name)]:
        sys.exit(f"Not set up: {', '.join(missing)}. Run  python benchmarks/setup.py {' '.join(missing)}")
    found = [agrees(workload) for workload in workloads]
    sys.exit(0 if all(found) else 1)


if __name__ == "__main__":
    main()
