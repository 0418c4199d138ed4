"""A recipe, the directory that its artefacts go to, and what has been opened for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from messnet.data import SegmentationDataset
from messnet.data.sources import open_dataset
from messnet.deployment.quantising import CALIBRATION
from messnet.errors import RunError
from messnet.network.blueprint import Blueprint
from messnet.network.head_space import HeadConfig, HeadSpace, plain_head_config
from messnet.network.multi_exit import MultiExitNet
from messnet.network.zoo import build_model
from messnet.records.costs import CostTable
from messnet.records.exit_tables import ExitTables
from messnet.records.instance import FINAL_HEAD, Exit
from messnet.records.run_directory import RunDirectory
from messnet.run.recipe import Recipe
from messnet.run.shards import unpack
from messnet.training.checkpoint import Checkpoint
from messnet.training.journal import Monitor

Split = Literal["train", "val"]
# Data workers outlive a killed training by up to five seconds, and hold its lock as long.
_LOCK_SECONDS = 8


class Run:
    """Everything that stages read and write. Data sets are opened once and the model is converted once: a stage takes
    the network over from the one before it, with the heads and weights that it asks for."""

    def __init__(self, recipe: Recipe, directory: RunDirectory) -> None:
        self.recipe, self.directory = recipe, directory
        self._datasets: dict[Split, SegmentationDataset] = {}
        self._network: MultiExitNet | None = None
        self._frozen: list[torch.nn.Parameter] = []

    @property
    def device(self) -> torch.device:
        return self.recipe.compute.fabric().device

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While the block runs no other process does a stage of this run. Raises RunError where one does.

        Processes that train together (compute.devices, torchrun) share the directory, and nothing is kept from them.
        """
        if self.recipe.compute.is_parallel:
            yield
            return
        # One lock for the process, so that blocks may lie in each other; the system frees it when the process ends.
        lock = FileLock(self.directory.path / ".lock", is_singleton=True)
        try:
            lock.acquire(timeout=_LOCK_SECONDS)
        except Timeout:
            raise RunError(
                f"another process is at work in {self.directory.path}: wait until it is done, or stop it first"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def dataset(self, split: Split) -> SegmentationDataset:
        if split not in self._datasets:
            self._datasets[split] = open_dataset(self.recipe.data, split)
        return self._datasets[split]

    def calibration(self) -> list[NDArray[np.uint8]]:
        """The training images that int8 takes the ranges of activations from."""
        train = self.dataset("train")
        # Of the training split: what judges int8 must not have shaped it.
        drawn = np.random.default_rng(CALIBRATION.seed).permutation(len(train))[: CALIBRATION.images]
        return [train[int(v)].image for v in drawn]

    def blueprint(self) -> Blueprint:
        return Blueprint.from_json(self.directory.exits.read())

    def costs(self, path: Path | None = None) -> CostTable:
        """The table at ``path``, by default the run's own, which knows no latency."""
        return self.directory.costs(path)

    def tables(self) -> ExitTables:
        return self.directory.tables.read()

    def checkpoint(self, name: str) -> Checkpoint:
        return Checkpoint(self.directory.checkpoint(name))

    def monitor(self, name: str) -> Monitor:
        """Where training tells how it goes."""
        return Monitor(self.directory.logs, self.dataset("val"), name)

    def adopt(self, net: MultiExitNet) -> None:
        """Takes over a network that has just been converted."""
        self._network = net
        self._frozen = [parameter for parameter in net.parameters() if not parameter.requires_grad]

    def network(self, exits: Sequence[Exit] = ()) -> MultiExitNet:
        """The network on the processor in eval mode, with fresh heads at ``exits`` and whatever weights it had last."""
        if self._network is None or self.recipe.compute.is_parallel:  # DDP leaves its hooks on the parameters
            self.adopt(self.blueprint().build())
        assert self._network is not None
        net: MultiExitNet = self._network.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        # As it was when it was converted, but for its weights: stage 2 freezes the backbone.
        net.drop_heads()
        net.requires_grad_(True)
        for parameter in self._frozen:
            parameter.requires_grad_(False)
        _add_exits(net, exits)
        return net.eval()

    def initial(self) -> MultiExitNet:
        """The network as stage 1 begins, its weights drawn by the recipe's seed."""
        torch.manual_seed(self.recipe.pretrain.seed)
        if self._network is None or self.recipe.compute.is_parallel:
            return self.network()
        # The weights that a conversion from the start would draw: it draws them before all else.
        blueprint = self.blueprint()
        drawn = build_model(blueprint.model, len(blueprint.class_names), **blueprint.model_options).state_dict()
        net = self.network()
        names = net.model_state_dict().keys()
        if names - drawn.keys():  # constants of forward, which may be drawn too, come with a conversion alone
            self._network = None
            torch.manual_seed(self.recipe.pretrain.seed)
            return self.network()
        net.load_model_state_dict({name: drawn[name] for name in names})
        return net

    def pretrained(self, *, with_heads: bool = False) -> MultiExitNet:
        """The network after stage 1, without heads or with the plain ones that the stage trained."""
        weights = self.directory.stage1.read()
        net = self.network()
        net.load_model_state_dict(_tensors(weights, self.directory.stage1.path))
        if with_heads:
            plain = _tensors(self.directory.stage1_heads.read(), self.directory.stage1_heads.path)
            _add_exits(net, [Exit(i, plain_head_config().name) for i in range(net.num_exits - 1)])
            net.heads.load_state_dict(plain)
        return net

    def trained(self, exits: Sequence[Exit] | None = None) -> MultiExitNet:
        """The network after stage 2, with the heads ``exits``, by default all of the recipe that did not diverge."""
        heads = unpack(self.directory.stage2.read(), str(self.directory.stage2.path))
        net = self.pretrained()
        if exits is None:
            # Heads that diverged have no weights.
            add_heads(net, self.recipe.heads)
            net.drop_heads([exit for exit in net.exits if exit not in heads.stopped])
        _add_exits(net, exits or ())
        try:
            net.heads.load_state_dict({name: heads.tensors[name] for name in net.heads.state_dict()})
        except (KeyError, RuntimeError) as error:
            raise RunError(f"{self.directory.stage2.path} is damaged or of another network ({error})") from error
        return net


def add_heads(net: MultiExitNet, heads: HeadSpace) -> None:
    """Every head of the space at every early exit point."""
    for i, point in enumerate(net.exit_points[:-1]):
        for config in heads.configs(point.channels):
            net.add_head(i, config)


def _add_exits(net: MultiExitNet, exits: Sequence[Exit]) -> None:
    for exit in exits:
        if exit.head != FINAL_HEAD:
            net.add_head(exit.exit_index, HeadConfig.parse(exit.head))


def _tensors(data: bytes, path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise RunError(f"{path} cannot be read ({error}); delete it and train again") from error
