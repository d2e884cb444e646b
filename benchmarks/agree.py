"""Whether jaxfed and plain JAX agree:  ``python benchmarks/agree.py [--workloads W1,W2,W3]``.

Both train 4 rounds of FedAvg with batches in the order of the data, in float32 and in float64. In float64 the losses must be
equal to 6 decimals. In float32 they must be equal to 4, and to what was found when the workloads were made. The exit status is 1
where they are not.
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


# What rounding the printed losses adds is a tenth of the tolerance.
PRECISIONS = {"float64": 1.1e-6, "float32": 6e-5}


def line_of(environment: str, module: str, workload: str, precision: str) -> dict:
    """The result of 4 unshuffled rounds in a process of its own."""
    options = ["--workload", workload, "--rounds", "4", "--shuffle", "0", "--float64", str(int(precision == "float64"))]
    command = [str(interpreter(environment)), "-m", f"peers.{module}", *options]
    output = subprocess.run(command, cwd=HERE, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(next(line for line in output.splitlines() if line.startswith('{"peer"')))


def agrees(workload: str, precision: str) -> bool:
    """Runs both and says what came."""
    ours, plain = (line_of(*who, workload, precision) for who in (("jaxfed", "jaxfed_rounds"), ("plain_jax", "plain_jax")))
    data, expected = EXPECTED[workload]
    targets = {"plain JAX": plain["loss"]}
    if ours["data"] == data and precision == "float32":
        targets["expected"] = expected
    good = all(abs(ours["loss"] - target) <= PRECISIONS[precision] for target in targets.values())
    said = ", ".join(f"{name} {target:.7g}" for name, target in targets.items())
    print(f"{workload} {precision}: jaxfed {ours['loss']:.7g}, {said}: {'equal' if good else 'DIFFERENT'}", flush=True)
    return good


def main() -> None:
    """Compares the workloads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(EXPECTED))
    workloads = parser.parse_args().workloads.split(",")
    if missing := [name for name in ("jaxfed", "plain_jax") if not is_ready(name)]:
        sys.exit(f"Not set up: {', '.join(missing)}. Run  python benchmarks/setup.py {' '.join(missing)}")
    found = [agrees(workload, precision) for workload in workloads for precision in PRECISIONS]
    sys.exit(0 if all(found) else 1)


if __name__ == "__main__":
    main()
