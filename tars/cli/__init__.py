"""`tars`: the operator's command line. It talks to a node through the Python client, like any other service; it serves nothing.

Law of this package: `output` turns messages into renderables, `connection` holds the options that every command shares and how a failure
becomes an exit code, the other modules are one command or a few. Standard output carries the answer and, with `--json`, one JSON
document and nothing else; progress, hints and errors go to standard error.
"""

from tars.cli.commands import main, run

__all__ = ["main", "run"]
