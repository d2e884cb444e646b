"""Sets up an environment of its own for every peer: ``python benchmarks/setup.py [NAME ...]``.

Each is a virtual environment ``benchmarks/.venvs/NAME`` with exactly the versions of ``environments/NAME.txt``; ours holds this
checkout in editable form too. An environment whose list has not changed since it was made is left alone.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENVS = HERE / ".venvs"
OURS = "jaxfed"


def names() -> list[str]:
    """The environments that there are."""
    return sorted(path.stem for path in (HERE / "environments").glob("*.txt"))


def interpreter(name: str) -> Path:
    """The Python of an environment."""
    return VENVS / name / "bin" / "python"


def is_ready(name: str) -> bool:
    """Whether the environment was finished with the list as it is now."""
    stamp = VENVS / name / "installed.txt"
    return stamp.exists() and stamp.read_text() == _pins(name).read_text()


def build(name: str) -> None:
    """Makes the environment from nothing; its list is stored in it when all is installed."""
    folder = VENVS / name
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [interpreter(name), "-m", "pip", "--disable-pip-version-check"]
    # The list is complete: nothing that it does not name may come in.
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "-r", _pins(name)], check=True)
    if name == OURS:
        subprocess.run([*pip, "install", "--quiet", "--no-deps", "-e", HERE.parent], check=True)
    # Some peers ask for versions that do not exist together; what pip says of that is shown and not judged.
    subprocess.run([*pip, "check"], check=False)
    shutil.copy(_pins(name), folder / "installed.txt")


def main() -> None:
    """Builds what is asked for and not ready."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"all by default: {', '.join(names())}")
    chosen = parser.parse_args().names or names()
    if unknown := sorted(set(chosen) - set(names())):
        parser.error(f"expected names among {', '.join(names())}; got {', '.join(unknown)}")
    for name in chosen:
        if is_ready(name):
            print(f"{name}: ready", flush=True)
        else:
            print(f"{name}: installing", flush=True)
            build(name)


def _pins(name: str) -> Path:
    return HERE / "environments" / f"{name}.txt"


if __name__ == "__main__":
    main()
