"""Runs the project's scripts in forks of a process that has imported them, which saves seconds per run.

Reads a request per line of JSON from stdin ({"id", "command", "cwd", "env", "stdout", "stderr"}) and answers on stdout
with a line `started <id> <process>` and, when it has ended, `ended <id> <status>`. Each run is a session of its own.
A command is what follows `python`: a script and its arguments, or `-m`, a module and its arguments.

Launchers (torchrun, ablate.py) start scripts themselves. These are forked too. They do not come from the launcher,
which has threads and a state of its own, but from a helper beside it. Still they are the launcher's children.
"""

import _posixsubprocess
import atexit
import ctypes
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Imported on first use, or by some tools.
import matplotlib.figure  # noqa: F401
import sklearn.datasets
import sklearn.metrics
import sklearn.model_selection  # noqa: F401
import timm  # noqa: F401
import torch.distributed.launcher.api
import torch.utils.tensorboard  # noqa: F401

import main  # noqa: F401

LAUNCHERS = ("torch.distributed.run", "torch.distributed.launch", "ablate.py")
PR_SET_CHILD_SUBREAPER = 36  # of prctl(2)


def child(request: dict) -> None:
    """Never returns."""
    os.setsid()
    for target, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["stdout"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        descriptor = os.open(path, flags, 0o644)
        os.dup2(descriptor, target)
        os.close(descriptor)
    run(request["command"], request["cwd"], request["env"])


def run(command: list[str], cwd: str, env: dict[str, str]) -> None:
    """What the interpreter does from its start to its end. Never returns."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    is_module = command[0] == "-m"
    sys.argv = command[is_module:]
    sys.path.insert(0, cwd if is_module else str(Path(sys.argv[0]).parent))
    if (sys.argv[0] if is_module else Path(sys.argv[0]).name) in LAUNCHERS:
        start_helper()
    status = 0
    try:
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
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


# What launchers start


def start_helper() -> None:
    """Forks the helper, and has subprocess ask it for each process that would run a script of Python's."""
    ours, helpers = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        help_launcher(helpers)
    helpers.close()
    prctl, fork_exec = ctypes.CDLL(None).prctl, _posixsubprocess.fork_exec

    def fork_from_helper(args, executables, close_fds, keep, cwd, env, *rest) -> int:
        """fork_exec of CPython's _posixsubprocess."""
        stdin, _, _, stdout, _, stderr, _, _, _, new_session = rest[:10]
        command = [os.fsdecode(arg) for arg in args]
        unbuffered = command[1:2] == ["-u"]
        words = command[1 + unbuffered :]
        if command[0] != sys.executable or not (words[0] == "-m" or words[0].endswith(".py")):
            return fork_exec(args, executables, close_fds, keep, cwd, env, *rest)
        environment = dict(os.environ) if env is None else dict(os.fsdecode(pair).split("=", 1) for pair in env)
        request = {"command": words, "cwd": os.fsdecode(cwd or os.getcwd()), "env": environment}
        request |= {"new_session": bool(new_session), "unbuffered": unbuffered}
        streams = [given if given != -1 else standard for standard, given in enumerate((stdin, stdout, stderr))]
        prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # so that orphans of the helper's become this process's children
        socket.send_fds(ours, [json.dumps(request).encode()], streams)
        process = int(ours.recv(64))
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        return process

    _posixsubprocess.fork_exec = subprocess._fork_exec = fork_from_helper  # the former up to Python 3.10


def help_launcher(connection: socket.socket) -> None:
    """Starts what the launcher asks for, until that has ended. Never returns."""
    stopping = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in stopping}  # they may go to the whole group
    while True:
        message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            os._exit(0)
        reading, writing = os.pipe()
        between = os.fork()
        if between == 0:
            between, process = os.getpid(), os.fork()
            if process:
                os.write(writing, str(process).encode())
                os._exit(0)
            connection.close()
            while os.getppid() == between:
                time.sleep(0.001)
            for target, stream in enumerate(streams):
                os.dup2(stream, target)
            os.closerange(3, max(*streams, reading, writing) + 1)
            for number, handler in before.items():
                signal.signal(number, handler)
            request = json.loads(message)
            if request["new_session"]:
                os.setsid()
            if request["unbuffered"]:
                sys.stdout.reconfigure(write_through=True)
            run(request["command"], request["cwd"], request["env"])
        os.waitpid(between, 0)
        connection.send(os.read(reading, 64))
        for descriptor in (*streams, reading, writing):
            os.close(descriptor)


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
