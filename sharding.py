"""
Weights split over processes, by PyTorch's fully_shard (FSDP2): where a copy in each is too much.

    shard(run, model.layers)            from here on each process has a part of every weight
    with unsharded(model): ...          all weights are in each process, for evaluations
    whole(tensor, keep)                 the tensor of which each process has a part
"""
import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist


def shard(run, blocks) -> None:
    """Splits weights, moving average and optimizer state of a training.Run over all processes, in
    place.

    It is done to a run that was taken up whole: any number of processes can go on. Weights and
    their gradients stay float32: --amp is autocast, as without, so that the run is the same."""
    from torch.distributed.fsdp import fully_shard  # here: these take a second to import
    from torch.distributed.tensor import distribute_tensor

    mesh = dist.init_device_mesh(run.ctx.device.type, (run.ctx.world_size,))
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # nothing is changed in place
    before = list(run.model.parameters())
    names = [name for name, module in run.model.named_modules() if module in blocks]
    for model in filter(None, (run.model, run.ema and run.ema.module)):
        for module in (*map(model.get_submodule, names), model):
            fully_shard(module, mesh=mesh, shard_placement_fn=even_axis(run.ctx.world_size))
    parts = dict(zip(before, run.model.parameters()))
    for group in run.optimizer.param_groups:
        group["params"] = [parts[param] for param in group["params"]]
    for param, part in parts.items():
        for name, value in run.optimizer.state.pop(param, {}).items():
            if value.shape == param.shape:  # no counter of steps
                value = distribute_tensor(value, mesh, part.placements, src_data_rank=None)
            run.optimizer.state[part][name] = value
    run.sharded = True


def even_axis(count: int) -> Callable:
    """parameter -> Shard(its first axis that makes `count` equal parts, else 0). The first axis of
    a mixer's parameters, the two directions, would leave most of the processes nothing."""
    from torch.distributed.tensor import Shard

    def split(param):
        even = [i for i, length in enumerate(param.shape) if length % count == 0]
        return Shard(even[0] if even else 0)

    return split


def whole(tensor: torch.Tensor, keep: bool) -> torch.Tensor | None:
    """All processes gather a tensor, on the CPU; None in those that do not keep it."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.cpu() if keep else None


@contextlib.contextmanager
def unsharded(model) -> Iterator[None]:
    """Every process has all weights: evaluations, unlike steps, need not keep in time."""
    modules = [module for module in model.modules() if hasattr(module, "unshard")]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    yield
    for module in modules:
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()
