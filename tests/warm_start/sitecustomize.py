"""Ray's worker processes as forks of one that has imported everything.

Some hundred workers start in these tests, and most of the suite's time would go by while each imports torch,
transformers and DeepSpeed. Python reads this file whenever it starts with this folder on its path: a worker of Ray then
asks a parent, which the fixture `forking` started, for a fork to run in its place, and waits for its end. The fork has
its own process id, environment, folder and output, and is told by Ray what any worker is told; its modules are there
already, that is all.
"""

from __future__ import annotations

import os
import sys

ADDRESS = "TALK_DIST_TESTS_FORKS"  # where the parent listens
WORKER = "ray/_private/workers/default_worker.py"


def ask(address, words):
    """Have a fork of the parent run ``words``, a script and its arguments, and end when it has ended."""
    import json
    import socket

    with socket.socket(socket.AF_UNIX) as parent:
        if parent.connect_ex(address):
            return  # it has ended; this worker starts as any other does
        message = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(parent, [len(message).to_bytes(8, "big")], [0, 1, 2])
        parent.sendall(message)
        parent.recv(1)  # nothing: it has closed its end
    os._exit(0)


def serve(address):
    """Fork for whoever asks, until the standard input ends, as it does with the tests. Nothing here may start a thread:
    a fork would not have it."""
    import select
    import signal
    import socket

    # not Ray, which reads its environment when it is imported
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.bert.modeling_bert  # noqa: F401

    import talk_dist.cli  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(address)
        door.listen(64)
        print("ready", flush=True)
        while sys.stdin not in select.select([door, sys.stdin], [], [])[0]:
            asking, _ = door.accept()
            head, files, _, _ = socket.recv_fds(asking, 8, 3)
            with asking.makefile("rb") as stream:
                message = stream.read(int.from_bytes(head, "big"))
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                door.close()
                become(files, message)
            asking.close()
            for file in files:
                os.close(file)


def become(files, message):
    """Run a script as Python would, in this process."""
    import json
    import runpy

    os.setpgrp()  # as Ray gives every worker one: it kills the group of a worker that has ended
    words, folder, environment = json.loads(message)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = words, os.path.dirname(words[0])
    code = 0
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(sys.argv[1])
elif ADDRESS in os.environ and len(sys.orig_argv) > 1 and sys.orig_argv[1].endswith(WORKER):
    ask(os.environ[ADDRESS], sys.orig_argv[1:])
