"""The device, the precision and the processes of a training, as Lightning Fabric has them."""

from __future__ import annotations

import os
from typing import Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.accelerators.cpu import CPUAccelerator
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.plugins.precision import MixedPrecision, Precision
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.single_device import SingleDeviceStrategy

from messnet.costs.latency import torch_device
from messnet.costs.processor import keep_freed_memory
from messnet.errors import RecipeError

# What Fabric calls them.
_FABRIC: dict[Literal["f32", "bf16"], Literal["32-true", "bf16-mixed"]] = {"f32": "32-true", "bf16": "bf16-mixed"}


class _Xpu(CPUAccelerator):
    """Intel's accelerator, which Fabric does not bring: one device, which the strategy names."""

    def setup_device(self, device: torch.device) -> None:
        torch.xpu.set_device(device)

    @staticmethod
    def is_available() -> bool:
        return torch.xpu.is_available()

    @staticmethod
    def name() -> str:
        return "xpu"


def is_parallel(devices: int) -> bool:
    """True where several processes train together: ``devices``, or as many as torchrun has started."""
    if TorchElasticEnvironment.detect():
        return int(os.environ["WORLD_SIZE"]) > 1
    return devices > 1


def make_fabric(device: str, precision: Literal["auto", "f32", "bf16"], devices: int) -> Fabric:
    """Of ComputeOptions' values; no other process is started or waited for. Raises RecipeError for a device that there
    is not."""
    try:
        kind = torch_device(device).type
    except RecipeError as error:
        raise RecipeError(f"compute.device: {error}") from error
    keep_freed_memory()
    named = _FABRIC[("bf16" if kind == "cuda" else "f32") if precision == "auto" else precision]
    if kind == "xpu":
        if is_parallel(devices):
            raise RecipeError("compute.device xpu trains in one process: leave compute.devices and torchrun out")
        plugin = Precision() if named == "32-true" else MixedPrecision(named, kind)
        return Fabric(accelerator=_Xpu(), strategy=SingleDeviceStrategy(kind), plugins=[plugin])
    if not is_parallel(devices):
        return Fabric(accelerator=kind, devices=1, precision=named)
    # Most plain heads of stage 1 have no part in an iteration's loss.
    strategy = DDPStrategy(find_unused_parameters=True)
    if not TorchElasticEnvironment.detect():
        return Fabric(accelerator=kind, devices=devices, strategy=strategy, precision=named)
    # torchrun has started the processes already, on this machine or on several: Fabric must not start others, and has
    # to be told how many machines there are, which torchrun says only as a quotient.
    world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    return Fabric(
        accelerator=kind,
        devices=local,
        num_nodes=world // local,
        strategy=strategy,
        precision=named,
        plugins=[TorchElasticEnvironment()],
    )
