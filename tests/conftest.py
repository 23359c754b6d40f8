"""What the tests share: small runs, real data where it is, and one migrated MLflow store to copy."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from filelock import FileLock
from torch import nn
from torch.optim import SGD, Adam

import clstream

if importlib.util.find_spec("clstream.strategies") is None:  # not installed: its packages lie side by side in the source tree
    clstream.__path__.append(str(Path(__file__).resolve().parent.parent))

import clstream.strategies as zoo
from dual_encoders import NAMES, trained_clip

from clstream import BatchLearned, Strategy, on, run
from clstream.adapters import LoRA, adapt
from clstream.avalanche import imports
from clstream.checkpoint import Checkpointer
from clstream.checks import example_model, example_stream
from clstream.models import VitTiny
from clstream.seeds import isolated

if TYPE_CHECKING:
    from outages import Server

os.environ["MPLBACKEND"] = "Agg"
os.environ["COLUMNS"] = "80"
for name in (
    "FORCE_COLOR",
    "NO_COLOR",
    "TTY_COMPATIBLE",
    "LINES",
    *(variable for variable in os.environ if variable.startswith("MLFLOW_")),
):
    os.environ.pop(name, None)  # what the user's terminal and server are
for name in ("NO_PROXY", "no_proxy"):
    os.environ[name] = "127.0.0.1,localhost"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; the processes of tests are to hear theirs
    signal.signal(signal.SIGINT, signal.default_int_handler)
if importlib.util.find_spec("hypothesis") is not None:  # tests/gpu does without
    from hypothesis import HealthCheck, settings

    settings.register_profile("clstream", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault
    settings.load_profile("clstream")


HAS_AVALANCHE = importlib.util.find_spec("avalanche") is not None
HAS_OPEN_CLIP = importlib.util.find_spec("open_clip") is not None
STRATEGIES = [
    name for name in zoo.__all__ if (HAS_AVALANCHE or name != "AvalancheStrategy") and (HAS_OPEN_CLIP or name != "CPECLIP")
]
"""The names of those that can be made here."""


def pytest_collection_finish() -> None:
    """Have the garbage collector pass over what is there already: torch, MLflow and the tests are a million objects that stay."""
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Give each test one thread, whatever the one before left, and leave out those whose data is not here."""
    torch.set_num_threads(1)
    if item.get_closest_marker("data") and not (Path(os.environ.get("CLSTREAM_DATA", "missing")) / "MNIST" / "raw").is_dir():
        pytest.skip("MNIST is not in CLSTREAM_DATA")


def params(plain: Iterable[str], real: Iterable[str]) -> list[Any]:
    """Return parameters of a test, of which some need real data."""
    return [*plain, *(pytest.param(name, marks=pytest.mark.data) for name in real)]


VITS = {"CODAPrompt", "CPEVision", "DualPrompt", "L2P", "MultiLane"}
"""Those that learn vision transformers alone."""


def vit_like(model: nn.Module, depth: int = 1) -> VitTiny:
    """Return a small vision transformer for the examples, with the kind of head that a model of theirs has."""
    head = getattr(model, "params", {}).get("head", "fixed")
    return VitTiny((1, 8, 8), 6, patch=4, width=32, depth=depth, heads=2, fused=True, head=head)


def make(name: str) -> Callable[[nn.Module], Strategy]:
    """Return what builds a strategy of ours from a model: the class, or one with what it needs."""
    if name == "AvalancheStrategy":
        from clstream.strategies.avalanche import strategy_class

        return strategy_class("Naive")
    if name == "Refresh":
        return lambda model: zoo.Refresh(zoo.DERpp(model))
    if name == "Regularised":
        return lambda model: zoo.Regularised(zoo.LwFMC(model), [zoo.EWCPenalty(0.01), zoo.FeatKDPenalty(0.1)])
    if name == "WithDetectedBoundaries":
        return lambda model: zoo.WithDetectedBoundaries(zoo.AGEM(model, per_task=20, sample=10), warmup=4, window=10)
    if name == "TAME":  # the examples are short: with the defaults the selector would take the time, and no expert be added
        short = {"window": 10, "selector_epochs": 20, "retrain_epochs": 10, "selector_sparsity": 0.2}
        return lambda model: zoo.TAME(model, partial(SGD, lr=0.1), **short)  # with momentum, batches of 8 saturate the sigmoid
    if name == "Federated":
        return lambda model: zoo.Federated(zoo.Replay(model))
    if name == "Active":
        return lambda model: zoo.Active(zoo.Replay(model), "evt")
    if name == "CoreSets":
        return lambda model: zoo.CoreSets(zoo.Replay(model))
    if name == "ContinualBackprop":
        return lambda model: zoo.ContinualBackprop(zoo.Finetune(model), rate=0.01, maturity=3)
    if name == "ReDo":
        return lambda model: zoo.ReDo(zoo.Finetune(model), period=5, samples=16)
    if name == "ShrinkAndPerturb":
        return lambda model: zoo.ShrinkAndPerturb(zoo.Finetune(model))
    if name == "ClassMeans":
        return lambda model: zoo.ClassMeans(zoo.Replay(model))
    if name == "RanPAC":  # of the paper's width, its statistics are 800 MB
        return lambda model: zoo.RanPAC(model, projection=100)
    if name == "SimCLR":  # the examples' patterns are white noise: a small crop of one, enlarged, is nothing of it
        return lambda model: zoo.SimCLR(model, partial(SGD, lr=0.1), temperature=1.0, smallest=1.0, jitter=0.0, blur=0.0)
    if name == "DynamicER":
        few = {"capacity": 60, "finetune_epochs": 4, "finetune_lr": 0.5, "finetune_batch": 16, "temperature": 1.0, "prune": True}
        return lambda model: zoo.DynamicER(model, partial(SGD, lr=0.1), **few)
    if name == "PODNet":
        return lambda model: zoo.PODNet(model, partial(SGD, lr=0.1), capacity=60, proxies=2, finetune_epochs=1)
    if name == "GSS":
        return lambda model: zoo.GSS(model, partial(SGD, lr=0.1), capacity=30, gradients=3)
    if name == "CoPE":
        return lambda model: zoo.CoPE(model, partial(SGD, lr=0.02), capacity=30, alpha=0.9, width=16)
    if name == "SCR":  # the same; and a temperature for so small a network
        return lambda model: zoo.SCR(model, partial(SGD, lr=0.1), 30, 10, temperature=0.2, smallest=1.0, jitter=0.0, width=16)
    if name == "EpisodicTraining":  # the examples have batches of 8
        return lambda model: zoo.EpisodicTraining(model, partial(SGD, lr=0.1), ways=2, shots=1, queries=1)
    if name == "SupportReplay":  # its learning rate is for the many steps of episodes
        return lambda model: zoo.SupportReplay(model, partial(SGD, lr=0.1))
    if name == "OpenVAE":  # its learning rate is for many steps, its decoder for larger images
        return lambda model: zoo.OpenVAE(model, partial(Adam, lr=0.01), latent=20, decoder=(32,), proposals=8192)
    if name == "ExpertGate":
        return lambda model: zoo.ExpertGate(model, code=16, gate_batch=20, gate_lr=0.05)
    if name == "ASER":
        return lambda model: zoo.ASER(model, capacity=30)
    if name == "BIR":  # of so few units each class needs its share
        return lambda model: zoo.BIR(model, partial(Adam, lr=0.01), decoder=(32,), latent=20, gated=0.5)
    if name == "DGR":
        return lambda model: zoo.DGR(model, partial(Adam, lr=0.01), hidden=(32,), latent=20)
    if name == "CPECLIP":  # towers that know the examples: a long prompt of random numbers would make them forget
        few = {"prompts": 2, "depth": 1, "schedule": "constant", "scale": 30.0, "class_names": NAMES}
        return lambda model: zoo.CPECLIP(trained_clip(vit_like(model).params["head"]), partial(SGD, lr=0.1, momentum=0.9), **few)
    if name == "CPEVision":
        return lambda model: zoo.CPEVision(vit_like(model, depth=2))
    if name == "CoACT":  # a crop of a pattern of white noise is nothing of it
        views = {"smallest": 1.0, "jitter": 0.0, "grayscale": 0.0}
        return lambda model: zoo.CoACT(adapt(vit_like(model), LoRA(2, modules="*.qkv"), trained=[]), partial(SGD, lr=0.02), **views)
    if name == "FSCIL":  # the examples begin with two classes: an encoder that learns them to the end tells no others apart
        return lambda model: zoo.FSCIL(model, partial(SGD, lr=0.003))
    if name == "APER":  # the same, of the whole network
        return lambda model: zoo.APER(model, partial(SGD, lr=0.003, momentum=0.9))
    if name == "MultiLane":
        return lambda model: zoo.MultiLane(vit_like(model), partial(Adam, lr=0.05), selectors=3, prompts=2, prompted_blocks=1)
    if name == "Hypernetwork":  # the defaults are for a network of 478,410 weights; the examples have one of 2,278
        return lambda model: zoo.Hypernetwork(model, chunk=500, task_size=8, chunk_size=8)
    if name == "CLSER":  # the examples have too few steps for averages over a thousand
        return lambda model: zoo.CLSER(model, stable_alpha=0.9, plastic_alpha=0.8)
    if name == "FDR":
        return lambda model: zoo.FDR(model, partial(SGD, lr=0.1), capacity=60)
    if name == "MER":  # the examples are few, and each has many steps
        return lambda model: zoo.MER(model, partial(SGD, lr=0.1), capacity=60, replay_batch=2, batches=1, beta=0.3)
    if name == "XDER":  # the examples' patterns are white noise
        return lambda model: zoo.XDER(model, partial(SGD, lr=0.1), capacity=60, contrast_batch=4, augmentation="stream")
    if name == "GDumb":  # the examples are quickly learned, and each session begins anew
        return lambda model: zoo.GDumb(model, partial(SGD, lr=0.05, momentum=0.9), capacity=60, epochs=8)
    if name == "WA":  # new classes have a share of the loss alone: the examples' few steps need momentum
        return lambda model: zoo.WA(model, partial(SGD, lr=0.03, momentum=0.9))
    if name == "L2P":
        return lambda model: zoo.L2P(vit_like(model), partial(Adam, lr=0.01), pool=4, length=2, chosen=2)
    if name == "DualPrompt":
        blocks = {"g_length": 2, "e_length": 2, "g_blocks": (0,), "e_blocks": (1,)}
        return lambda model: zoo.DualPrompt(vit_like(model, depth=2), partial(Adam, lr=0.01), **blocks)
    if name == "CODAPrompt":
        return lambda model: zoo.CODAPrompt(vit_like(model), partial(Adam, lr=0.01), components=3, length=2, blocks=(0,))
    return getattr(zoo, name)


def built(make: Callable[[nn.Module], Strategy] = zoo.Replay) -> Strategy:
    """Return a fresh strategy for the example stream, the same each time."""
    with isolated(0, "strategy"):
        return make(example_model())


class StopAt:
    """Ends the run, as a failure of the user's would, after some batches."""

    def __init__(self, batches: int) -> None:
        self.left = batches

    @on(BatchLearned)
    def count(self, event: BatchLearned) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def interrupted(folder: Path, batches: int = 13, every: int = 4, **options: object) -> None:
    """Leave a folder as a run does that is interrupted."""
    checkpointer = Checkpointer(folder, every_batches=every, **{"every_seconds": None, **options})
    with pytest.raises(KeyboardInterrupt):
        run(built(), example_stream(), StopAt(batches), checkpointer)


@pytest.fixture(scope="session")
def avalanche() -> Callable[[str], ModuleType]:
    """What returns a module of Avalanche by name; the tests that need it are left out where it is not installed."""
    if not HAS_AVALANCHE:
        pytest.skip("avalanche-lib is not installed: the extra `test` brings it, up to Python 3.12; there is none for newer ones")
    return imports.import_avalanche


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store with all of its tables, made once for all processes of pytest-xdist: that takes seconds."""
    from clstream.tracking.mlflow_store import connect

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # a folder in that of them all
        folder = folder.parent
    file = folder / "empty.db"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            beside = folder / "migrating.db"
            connect(f"sqlite:///{beside}", "made by the tests")
            beside.rename(file)
    return file


@pytest.fixture
def store(migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an empty MLflow store in a working folder of the test's own."""
    shutil.copy(migrated, tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture(params=["sqlite", "files"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store that drops equal points by itself, and one that keeps all that it is given."""
    if request.param == "sqlite":
        return str(request.getfixturevalue("store"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return str(tmp_path / "mlruns")


@pytest.fixture(scope="session")
def shared_server(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An MLflow server for all tests of a process, to start again where one killed it."""
    from outages import Server

    folder = tmp_path_factory.mktemp("server")
    shutil.copy(migrated, folder / "mlflow.db")
    server = Server(folder)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def server(shared_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, up, and a working folder of the test's own."""
    shared_server.start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # a busy machine is no outage
    return shared_server


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each evaluation is sent at once, as those of long sessions are."""
    monkeypatch.setattr("clstream.tracking.uploader.PAUSE_RATIO", 0)


@pytest.fixture(scope="session")
def undisturbed(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, float]]]:
    """The curves of a run whose server was there all the time."""
    from outages import expected

    file = tmp_path_factory.mktemp("undisturbed") / "mlflow.db"
    shutil.copy(migrated, file)
    before = Path.cwd()
    os.chdir(file.parent)
    curves = expected(file)
    os.chdir(before)
    assert len(curves["accuracy/mean"]) == 6 and len(curves["anytime/task_00"]) == 9 and len(curves["final/min_accuracy"]) == 1
    return curves
