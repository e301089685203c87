"""Divide a model's parameters among the ranks by ZeRO-3 for inference, in which each rank has rows of its own."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from transformers import PreTrainedModel

from toolkit.engine.deepspeed.device import device_index_as_local_rank
from toolkit.engine.deepspeed.gathering import balanced_module_stack, drain_prefetches
from toolkit.engine.deepspeed.json_file import (
    check_sections,
    fill_bucket_sizes,
    find_autos,
    read_ds_config,
    zero_stage,
)
from toolkit.engine.deepspeed.process_groups import unlink_shared_memory
from toolkit.runtime.distributed import World
from toolkit.runtime.errors import ConfigError

_TRAINING_KEYS = ("offload_optimizer", "zenflow")
"""Keys of ``zero_optimization`` that stand for what only training has."""


class PartitionedModel:
    """A model whose parameters ZeRO-3 has divided among the ranks, and gathers layer by layer in each forward pass.

    Every pass is a collective, and the ranks need different numbers of them: those that are done join the passes of the
    others in ``wait``.

    Args:
        model: model on the CPU, in evaluation mode; its parameters are divided in place.
        world: this process among all ranks; its process group must be initialised, even for one rank.
        ds_config: configuration as ``read_inference_config`` returns it.

    Raises:
        ConfigError: DeepSpeed refuses the configuration.
    """

    def __init__(self, model: PreTrainedModel, world: World, ds_config: dict[str, Any]) -> None:
        import deepspeed
        from deepspeed.runtime.config import DeepSpeedConfigError

        self.model, self._world, self._is_idle = model, world, False
        ds_config = copy.deepcopy(ds_config)
        fill_bucket_sizes(ds_config["zero_optimization"], model.config.get_text_config().hidden_size)
        try:
            # standard output is for answers, and DeepSpeed prints there what it compiles
            with device_index_as_local_rank(world.device), redirect_stdout(sys.stderr):
                # tensor by tensor: as a whole the model may not fit the device
                deepspeed.zero.Init(module=model, config_dict_or_path=ds_config, dtype=model.dtype)
                for module in model.modules():
                    module._buffers.update({
                        name: buffer.to(world.device) for name, buffer in module._buffers.items() if buffer is not None
                    })  # fmt: skip
                self._engine, *_ = deepspeed.initialize(model=model, config=ds_config, dist_init_required=False)
        except (ValidationError, DeepSpeedConfigError) as error:
            raise ConfigError([" ".join(str(error).split())], "DeepSpeed file, as DeepSpeed reads it") from None
        unlink_shared_memory(world)
        model.register_forward_pre_hook(self._announce, prepend=True)  # before DeepSpeed gathers anything

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Run forward passes of this rank in the body; after an exception in it the model can be used again."""
        try:
            with balanced_module_stack():
                yield
        except BaseException:
            drain_prefetches(self._engine)
            raise

    @torch.no_grad()
    def wait(self) -> None:
        """Join the forward passes of other ranks, on a token, until every rank waits; all ranks call it."""
        self._is_idle = True
        while self._count_busy(0).item():
            self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self._world.device), use_cache=False)
        self._is_idle = False

    def _announce(self, *_: object) -> None:
        """Tell the ranks that wait that there is a pass to join."""
        if not self._is_idle:
            self._count_busy(1)

    def _count_busy(self, own: int) -> torch.Tensor:
        """Return how many ranks have a pass to do, a scalar on this rank's device."""
        busy = torch.tensor(own, device=self._world.device)
        dist.all_reduce(busy)
        return busy


def read_inference_config(path: Path) -> dict[str, Any]:
    """Return what ``PartitionedModel`` needs of a DeepSpeed JSON that may have been written for training.

    Raises:
        ConfigError: the file cannot be used, or its stage divides no parameters; lists all faults.
    """
    content = read_ds_config(path)
    faults = list(check_sections(content))
    if faults:
        raise ConfigError(faults, f"DeepSpeed file {path}")
    zero = {key: value for key, value in content.get("zero_optimization", {}).items() if key not in _TRAINING_KEYS}
    if (stage := zero_stage(content)) != 3:
        faults.append(
            f"zero_optimization.stage is {stage}, which divides nothing that answers are computed with; write 3, or "
            "leave --ds out: the ranks divide the questions without it too"
        )
    offload = zero.get("offload_param")
    if isinstance(offload, dict) and offload.get("device") == "nvme":
        faults.append("zero_optimization.offload_param.device is 'nvme', which only training uses; write 'cpu'")
    filled = dict(zero)
    fill_bucket_sizes(filled, 1)
    autos = find_autos(filled, "zero_optimization")
    faults += [f'{where} is "auto", but nothing fills it; give a value' for where in autos]
    if faults:
        raise ConfigError(faults, f"DeepSpeed file {path}")
    # no precision is named, because DeepSpeed would cast to it; the model has the one that it answers in
    return {"train_micro_batch_size_per_gpu": 1, "steps_per_print": 2**31, "zero_optimization": zero}
