"""The same start for every test: one thread, one seed, no window."""

import os

import pytest
import torch
from lightning.pytorch import seed_everything

os.environ["MPLBACKEND"] = (
    "Agg"  # read when matplotlib is imported, which the tests on a GPU do not
)
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cuda",
        choices=["cuda", "cpu"],
        help="where tests/gpu train; `cpu` tries their logic where there is no GPU",
    )
    parser.addoption("--few", type=int, help="of tests/gpu, only so many cases of each test")


@pytest.fixture(autouse=True)
def _seed():
    seed_everything(0, verbose=False)


# FSDP2 on the CPU came with a later torch than the oldest that we support; on GPUs it is older.
_FSDP2 = hasattr(torch.cpu.Stream, "record_event")


# Rooms whose files take longest come first, so that no process has a long one left at the end.
_LONGEST = ["ranks", "compare", "ported", "trainer", "engine"]


def pytest_collection_modifyitems(items):
    """The longest first; leave out FSDP2 where torch has none for the CPU."""
    places = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path.parent.name, len(places)))
    for item in items:
        cut = "[" in item.name and any(
            word in item.name for word in ("fsdp2", "parts", "absent on one")
        )
        if not _FSDP2 and (cut or "folder_of_parts" in item.name):
            item.add_marker(pytest.mark.skip(reason="this torch has no FSDP2 on the CPU"))
