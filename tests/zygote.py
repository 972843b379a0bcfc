"""Runs the project's scripts in forks of a process that has imported them, which saves seconds per run.

Reads a request per line of JSON from stdin ({"id", "command", "cwd", "env", "stdout", "stderr"}) and answers on stdout
with a line `started <id> <process>` and, when it has ended, `ended <id> <status>`. Each run is a session of its own.
"""

import atexit
import json
import os
import runpy
import select
import signal
import sys
import threading
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Imported on first use, or by some tools.
import matplotlib.figure  # noqa: F401
import timm  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import main  # noqa: F401


def child(request: dict) -> None:
    """Never returns."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for target, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        descriptor = os.open(path, flags, 0o644)
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = request["command"]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    status = 0
    try:
        runpy.run_path(request["command"][0], run_name="__main__")
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    # As the interpreter does at its end.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve() -> None:
    running, answers = {}, os.fdopen(os.dup(1), "w")
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    pending = b""
    while True:
        if select.select([requests], [], [], 0.02)[0]:
            received = os.read(requests.fileno(), 65536)
            if not received:
                return
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                request = json.loads(line)
                process = os.fork()
                if process == 0:
                    child(request)
                running[process] = request["id"]
                print("started", request["id"], process, file=answers, flush=True)
        for process in list(running):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                print("ended", running.pop(process), os.waitstatus_to_exitcode(status), file=answers, flush=True)


if __name__ == "__main__":
    serve()
