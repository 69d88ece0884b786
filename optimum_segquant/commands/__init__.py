"""``optimum-cli segquant``: quantize, export, evaluate, inspect, benchmark and serve from the command line.

Exit codes: 0, all went well; 2, something given was wrong, with one line on stderr that says what to do; 1, anything
else, with a traceback under ``--debug``. Results go to stdout, with ``--json`` as one JSON document and nothing else;
progress and logs go to stderr.

Each command is a class with a table of :class:`~.options.Option` objects and a function that does the work. Heavy
packages are imported by that function, so that ``optimum-cli`` itself stays quick.
"""

from .segquant import SegQuantCommand

__all__ = ["SegQuantCommand"]
