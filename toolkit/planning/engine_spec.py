"""Describe an engine by the settings that its memory follows from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from toolkit.config.schema import OptimName
from toolkit.engine.deepspeed.config import zero_config

Place = Literal["device", "cpu", "nvme"]


@dataclass(frozen=True)
class EngineSpec:
    """The settings that determine an engine's memory."""

    stage: int | None
    """ZeRO stage; None for the engine without DeepSpeed."""
    ranks: int
    accumulates: bool
    """True if a step has more than one micro batch."""
    bucket: int = 0
    """Most elements of a reduction bucket."""
    buckets: int = 1
    """Reduction buckets that DeepSpeed allocates: two where communication overlaps."""
    persistent: int = 0
    """ZeRO-3 keeps parameters of up to so many elements whole on every rank."""
    live: int = 0
    """Elements that ZeRO-3 may keep gathered at once."""
    optimizer: OptimName = "adamw"
    """The recipe's optim.name."""
    optimizer_at: Place = "device"
    """Place of masters, moments and gradients."""
    weights_at: Place = "device"
    """Place of a rank's partition of the suffix's weights under ZeRO-3."""
    swapped: int = 0
    """Elements of a sub-group, in which ZeRO-3 swaps optimizer state from NVMe."""
    swap_buffers: int = 0
    """Number of swap buffers of that size in host memory."""
    weight_buffers: int = 0
    """Elements of the host buffers through which ZeRO-3 swaps the suffix's weights from NVMe."""
    host_is_device: bool = False
    """True if the run computes on a CPU, so that offloading to the host saves nothing."""
    reduce_width: int | None = None
    """Bytes of an element in which gradients are summed over ranks; None for the model's precision."""
    has_kernels: bool = False
    """True if the engine without DeepSpeed updates by kernels of its own (``toolkit.optim.kernel_choice``)."""

    @property
    def name(self) -> str:
        """Return the engine's name in the training log."""
        return "local" if self.stage is None else f"zero-{self.stage}"

    def copy_width(self, width: int) -> int:
        """Return the bytes of an element of the copy in which gradients of ``width`` are summed; 0 without a copy."""
        return 0 if self.reduce_width is None or self.reduce_width == width else self.reduce_width


def engine_spec(
    ds_config: dict[str, Any] | None,
    ranks: int,
    accumulation: int,
    optimizer: OptimName = "adamw",
    host_is_device: bool = False,
    has_kernels: bool = True,
    reduce_dtype: str = "float32",
) -> EngineSpec:
    """Return the engine of a resolved DeepSpeed configuration; ``ds_config`` is None for the engine without DeepSpeed.

    Raises:
        ConfigError: DeepSpeed refuses the configuration.
    """
    if ds_config is None:
        return EngineSpec(
            None, ranks, accumulation > 1, optimizer=optimizer, host_is_device=host_is_device,
            has_kernels=has_kernels and not host_is_device, reduce_width=2 if reduce_dtype == "bfloat16" else 4,
        )  # fmt: skip
    zero = zero_config(ds_config)
    state, weights = zero.offload_optimizer, zero.offload_param
    return EngineSpec(
        zero.stage,
        ranks,
        accumulation > 1,
        bucket=zero.reduce_bucket_size if zero.stage and zero.contiguous_gradients else 0,
        buckets=2 if zero.overlap_comm and zero.stage != 3 else 1,
        persistent=zero.param_persistence_threshold,
        live=zero.max_live_parameters,
        optimizer=optimizer,
        optimizer_at=_offload_place(state) if zero.stage else "device",
        weights_at=_offload_place(weights) if zero.stage == 3 else "device",
        swapped=zero.sub_group_size,
        swap_buffers=state.buffer_count if state else 0,
        weight_buffers=weights.buffer_count * weights.buffer_size if weights else 0,
        host_is_device=host_is_device,
        reduce_width={"fp32": 4, "bf16": 2, "fp16": 2}.get(ds_config.get("communication_data_type", "")),
    )


def _offload_place(section: Any) -> Place:
    """Return the place that one of DeepSpeed's offload sections names; None offloads nothing."""
    return "device" if section is None or section.device == "none" else section.device


def zero_spec(
    stage: int, ranks: int, accumulates: bool, hidden_size: int, optimizer: OptimName, offload: bool = False
) -> EngineSpec:
    """Return the engine that ``ds_configs/zeroN.json`` of this repository asks for, or ``zeroN_offload.json``."""
    spec = EngineSpec(
        stage, ranks, accumulates, hidden_size**2 if offload else int(5e7), 2 if stage == 1 else 1, 10 * hidden_size,
        int(1e9), optimizer,
    )  # fmt: skip
    return replace(spec, optimizer_at="cpu", weights_at="cpu" if stage == 3 else "device") if offload else spec
