"""
The processes of a run: how many there are, which one this is, on which device, with which seed.

Launchers tell it by environment variables, each by its own: torchrun RANK and WORLD_SIZE, SLURM's
srun SLURM_PROCID and SLURM_NTASKS. A process that overlooks the others trains as if it were alone,
over their files: what does not fit together is refused.
"""
import gc
import os
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

# Number of this process, of all processes, of this one on its machine.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "SLURM": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MVAPICH": ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    "MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}


@dataclass(frozen=True)
class Context:
    """This process, the rank-th of world_size."""
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *words) -> None:
        if self.is_main:
            print(*words, flush=True)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place; no communication when there is one."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def total(self, number: float) -> float:
        """The sum of a number over all processes, each of which waits for the others."""
        return self.sum(torch.tensor(float(number), device=self.device)).item()

    def gather(self, value) -> list:
        """The values of all processes, in their order."""
        everyone = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(everyone, value)
        return everyone

    def close(self) -> None:
        if self.world_size > 1:
            gc.collect()  # what still holds the group, such as a wrapped model in a cycle
            dist.barrier()
            dist.destroy_process_group()


def join(device: str) -> Context:
    """Joins the processes that a launcher started, if it did.

    ValueError: what it says does not fit together. SystemExit: no such device."""
    rank, world_size, local_rank = place()
    chosen = choose_device(device, world_size, local_rank)
    if world_size > 1:
        meet(rank, world_size, chosen)
    return Context(rank, world_size, chosen)


def meet(rank: int, world_size: int, device: torch.device) -> None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"this is process {rank} of {world_size}, and {' and '.join(missing)} not set, by "
            "which they find each other: start with torchrun (under SLURM one task a node, srun "
            "--ntasks-per-node 1 torchrun ...), set both, or start a single process")
    backend = "nccl" if device.type == "cuda" else "gloo"
    settings = {"device_id": device} if device.type == "cuda" else {}
    dist.init_process_group(backend, rank=rank, world_size=world_size, **settings)


def place() -> tuple[int, int, int]:
    """-> (rank, processes, rank on this machine), as the launcher says; (0, 1, 0) without one.

    Of several launchers the one with most processes: srun may start a torchrun on each node.
    ValueError: a number is missing, none, or out of range."""
    launchers = [names for names in LAUNCHERS.values() if os.environ.keys() & names]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launchers = [LAUNCHERS["torchrun"]]  # its own process, whatever surrounds it
    found = [numbers_of(*names) for names in launchers]
    return max(filter(None, found), key=lambda numbers: numbers[1], default=(0, 1, 0))


def numbers_of(rank: str, size: str, local: str) -> tuple[int, int, int] | None:
    """What a launcher says in these variables, None if it was none."""
    said = {name: os.environ[name] for name in (rank, size, local) if name in os.environ}
    if size == "SLURM_NTASKS":
        if rank not in said:  # in the shell of an allocation: SLURM has started no task
            return None
        said[size] = os.environ.get("SLURM_STEP_NUM_TASKS", said.get(size, "1"))
    words = " ".join(f"{name}={value}" for name, value in said.items())
    way_out = "start with torchrun, or unset them to run a single process"
    if missing := [name for name in (rank, size) if name not in said]:
        lacks = " and no ".join(missing)
        raise ValueError(f"{words} in the environment, but no {lacks}: {way_out}")
    try:
        numbers = int(said[rank]), int(said[size]), int(said.get(local, "0"))
    except ValueError:
        raise ValueError(f"{words} in the environment: numbers are expected; {way_out}") from None
    if not 0 <= numbers[0] < numbers[1] or numbers[2] < 0:
        raise ValueError(f"{words} in the environment: there is no such process; {way_out}")
    return numbers


def choose_device(name: str, world_size: int, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SystemExit(f"--device {name} cannot be used: {str(error).splitlines()[0]}")
    if device.type == "cuda":
        return choose_gpu(device, world_size, local_rank)
    return device


def choose_gpu(device: torch.device, world_size: int, local_rank: int) -> torch.device:
    """The one that --device names, or else one for each process."""
    if world_size > 1 or device.index is None:
        count = torch.cuda.device_count()
        if count == 1:  # SLURM shows each task its own
            local_rank = 0
        if local_rank >= count:
            raise ValueError(f"this process is the one of number {local_rank} on its machine, "
                             f"which has {count} GPUs: start no more processes than GPUs")
        device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.cuda.init()  # so that seed_everything reaches it
    return device


def seed_everything(*key: int) -> None:
    """Seeds all global generators: random, NumPy's legacy one (timm's mixup has it), torch's."""
    words = [int(word) for word in np.random.SeedSequence(key).generate_state(3)]
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])  # torch.manual_seed takes 0.1 ms, every step
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(words[2])
