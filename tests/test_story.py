"""The package reads as a federated round: every module imports only what comes before it, so that no cycle can exist."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxfed

ROOT = Path(jaxfed.__file__).parent
STORY = """
    checks part trees permutation programs messages base
    optimizer.rates optimizer.schedules optimizer.regularizers optimizer.momentum optimizer.adaptive optimizer.clipping
    optimizer.noise optimizer.paired optimizer.feddyn optimizer.mime optimizer.foreign optimizer.optimizer
    client.batches client.gradients client.precision client.privacy client.measures client.local client.surveys
    personal.wrapper personal.partial personal.ditto personal.pfedme personal.fedem personal.apfl personal.finetune
    server.aggregators server.normalized server.fair server.robust server.geometric
    server.selection server.ranking server.oort server.clock server.asynchronous server.private attacks
    engine.algorithm engine.mesh engine.population engine.sums engine.lanes engine.cohort engine.survey engine.round
    engine.rounds engine.compilation engine.evaluation
    algorithms algorithms_corrected algorithms_personal
    files data.rows data.stored data.federated data.partition data.archives data.datasets data
    models.windows models.image_loops models.layers models.recurrent models.advice models.losses models.survival
    models.functions models.adapters models.rnn models.reference models
    reports stopping placement paging lane_choice simulation differentiable hyperparameters side_by_side sweep
    accounting bottleneck costs step_costs profiling testing
    run.environment run.machines run.section run.config run.journal run.tables run.checkpoint run.history run.client_curves
    run.watching run.export run.plots run.client_plots run.sweep_plots run.listing run.show run.build run.folder run.training
    run.sweeping run run.commands run.cli
""".split()
HOST = STORY[STORY.index("files") :]


def module_path(name: str) -> Path:
    path = ROOT.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports(name: str) -> set[str]:
    """The names that a module imports, those of our own without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(module_path(name).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {imported(node.module, alias.name) for alias in node.names}
    return {name.removeprefix("jaxfed.") for name in found}


def imported(module: str, name: str) -> str:
    """The module that ``from module import name`` needs: one of a package, or ``module`` itself."""
    inner = f"{module}.{name}".removeprefix("jaxfed.")
    return inner if module.startswith("jaxfed") and module_path(inner).exists() else module


def test_story_names_every_module():
    files = {path.relative_to(ROOT).with_suffix("") for path in ROOT.rglob("*.py")}
    names = {".".join(path.parts).removesuffix(".__init__") for path in files} - {"__init__"}
    empty = {"optimizer", "client", "personal", "server", "engine", "run.__main__"}
    assert names - empty == set(STORY)


@pytest.mark.parametrize("module", STORY)
def test_module_imports_only_what_comes_before(module):
    assert not imports(module) & set(STORY[STORY.index(module) :])


# What checks and parts do to a value, they do on the host, before anything is traced.
@pytest.mark.parametrize("module", [name for name in STORY if name not in (*HOST, "checks", "part")])
def test_compiled_part_does_not_touch_numpy(module):
    assert not any(name.split(".")[0] == "numpy" for name in imports(module))


def test_import_is_light():
    """``import jaxfed`` loads neither flax nor orbax, nor anything that is an extra."""
    heavy = ["flax", "orbax", "matplotlib", "rich", "tyro", "sklearn", "safetensors", "tomli_w", "jaxfed.run"]
    code = f"import sys, jaxfed; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
