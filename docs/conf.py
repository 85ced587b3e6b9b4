"""Sphinx: MyST pages, the furo theme, API from the docstrings, every example a doctest."""

from lightning_mtl.version import __version__

project = "lightning-mtl"
author = "the lightning-mtl contributors"
copyright = author  # noqa: A001 # Sphinx wants this name
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"lightning-mtl {release}"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
# What Lightning and torchmetrics document about an overridden hook is in their own pages.
autodoc_inherit_docstrings = False
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Examples of pages are run here, examples of docstrings by pytest, in their module's namespace.
doctest_test_doctest_blocks = ""
doctest_global_setup = """
import logging, os, tempfile, warnings
import matplotlib
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)
torch.manual_seed(0)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*does not have many workers")
warnings.filterwarnings("ignore", message=".*smaller than the logging interval")
warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec")
_start = os.getcwd()
_folder = tempfile.TemporaryDirectory()
os.chdir(_folder.name)
"""
doctest_global_cleanup = """
os.chdir(_start)
_folder.cleanup()
"""
