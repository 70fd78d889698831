"""All kinds of mistakes that benchmarks/malformed.py makes, drawn at random."""

from benchmarks import malformed_base, malformed_commands, malformed_files

TINY = malformed_base.TINY
KINDS = {**malformed_commands.KINDS, **malformed_files.KINDS}
