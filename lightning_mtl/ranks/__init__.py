"""Where task gradients live and how the processes of a run agree on them."""

from lightning_mtl.ranks.data_parallel import DataParallel, ranks_of
from lightning_mtl.ranks.one_process import OneProcess

__all__ = ["DataParallel", "OneProcess", "ranks_of"]
