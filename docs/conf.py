"""The site: python -m sphinx -W --keep-going -b html docs docs/_build/html"""

import os
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / '_ext'))  # the extensions below
sys.path.insert(0, str(HERE.parent))  # this clone, whatever is installed
# The kernels of the notebooks import this clone, too, and need no accelerator.
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get('PYTHONPATH')]))
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from convnorm_jax.version import __version__  # noqa: E402

project = 'convnorm_jax'
author = 'the convnorm_jax authors'
copyright = author
version = release = __version__

extensions = [
    'myst_nb',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.mathjax',
    'docstrings',
    'tables',
    'commands',
]
exclude_patterns = ['_build', 'results', 'images']
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence', 'deflist', 'attrs_block']
myst_heading_anchors = 3

# Single backticks in docstrings are code; docs/_ext/docstrings.py says how the rest of them is read.
default_role = 'code'
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'  # the docstrings say shapes, which types do not
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
toc_object_entries_show_parents = 'hide'

nb_execution_mode = 'cache'
nb_execution_cache_path = str(HERE / '_build' / 'jupyter_cache')
nb_execution_raise_on_error = True
nb_execution_timeout = 900  # of a cell; idle, the longest takes half a minute
nb_execution_show_tb = True
nb_merge_streams = True

html_theme = 'sphinx_book_theme'
html_title = 'convnorm_jax'
html_static_path = ['_static']
html_css_files = ['site.css']
html_copy_source = False
html_theme_options = {
    'show_navbar_depth': 1,
    'show_toc_level': 2,
    'use_download_button': False,
    'use_fullscreen_button': False,
    'home_page_in_toc': True,
    'navbar_persistent': [],
}
