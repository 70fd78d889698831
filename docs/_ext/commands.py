"""`{command-help} NAME`: what `convnorm NAME --help` prints."""

import os
import subprocess
import sys

from docutils import nodes
from sphinx.util.docutils import SphinxDirective


class CommandHelp(SphinxDirective):
    """The directive."""

    optional_arguments = 1

    def run(self):
        """A block of code."""
        command = [*self.arguments, '--help']
        process = subprocess.run(
            [sys.executable, '-m', 'convnorm_jax.cli.convnorm', *command],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
        )
        text = process.stdout.strip()
        return [nodes.literal_block(text, text, language='text')]


def setup(app):
    """Sphinx's hook."""
    app.add_directive('command-help', CommandHelp)
    return {'parallel_read_safe': True}
