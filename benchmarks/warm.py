"""Forks commands of convnorm_jax.cli.run from one process that has imported everything, so that starts are short."""

import multiprocessing
import os
import signal
import sys
import traceback

IMPORTED = [
    'benchmarks.warm',
    'convnorm_jax.cli.run',
    'convnorm_jax.reports.gan',
    'convnorm_jax.reports.classifier',
    'sklearn.datasets',
]


def prepare(compiled):
    """Sets this process's environment for the commands to come; call it before anything imports JAX.

    Args:
      compiled: folder of the compilation cache that they share.

    Returns:
      A multiprocessing context, which starts them.
    """
    os.environ |= {
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': '1',
        'JAX_COMPILATION_CACHE_DIR': compiled,
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'PYTHONWARNINGS': 'ignore::UserWarning',  # of what killed processes leave behind
    }
    os.environ.pop('XLA_FLAGS', None)
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(IMPORTED)
    return context


def start(context, arguments, log, errors=None):
    """Starts convnorm_jax.cli.run with these arguments; returns the process.

    Args:
      context: of `prepare`.
      arguments: list of str.
      log: file that its output is appended to.
      errors: file for its standard error; None for `log`.
    """
    process = context.Process(target=_run, args=(arguments, log, errors))
    process.start()
    return process


def _run(arguments, log, errors):
    from convnorm_jax.cli import run as main

    for number, path in ((1, log), (2, errors or log)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ['convnorm_jax.cli.run', *arguments]
    code = 1
    try:
        code = main.main()
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(code)
