"""The process in which a synchronous grader runs: `python -m miles.rewards.child FD`, started by
`ProcessPool`.

Owns the answering side only: load the grader named in the first message, then answer one call after another.
"""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection

from miles.errors import DataError
from miles.rewards.functions import describe, load_function
from miles.rewards.processes import Call, Outcome, judge


def serve(connection: Connection) -> None:
    """Load the grader, say so, then answer calls until the parent is gone: EOFError or OSError."""
    # Signals that announce the end of the job go to every process of it; this one ends with its parent.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    grader, args = connection.recv()
    try:
        function = load_function(grader, args)
    except DataError as error:
        connection.send(error)
        return
    connection.send(None)
    while True:
        call: Call = connection.recv()
        try:
            result = function(call.prompt, call.response, call.label, call.metadata, **args)
        except Exception as error:  # whatever user code raises
            connection.send(Outcome({}, failure=f"raised {describe(error)}"))
        else:
            connection.send(judge(result))


if __name__ == "__main__":
    with suppress(EOFError, OSError):
        serve(Connection(int(sys.argv[1])))
