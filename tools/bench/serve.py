"""The process of a `RemoteStep`: builds a step from the modules on its path, and runs it when told to.

    python -m bench.serve CONTENDER SETTINGS

Reads lines from standard input ("run 3", "peak") and answers each, and its start, with a line of JSON.
"""

import json
import os
import sys

import torch


def build_step(contender: str, device: str, threads: int, batch: int, img_size: int, memory_format: str, **options):
    """A `Step`.

    Args:
        options: the arguments of `Step` by name: task, dtype, compile_mode, freeze.
    """
    # Here, so that an older revision that lacks what they import is told like any other failure.
    from bench.contenders import DTYPES, Step, parse_contenders, random_batch, set_up_device

    torch.set_num_threads(threads)
    set_up_device(torch.device(device))
    images, targets = random_batch(batch, img_size, torch.device(device), memory_format)
    options["dtype"] = DTYPES[options["dtype"]]
    return Step(parse_contenders([contender])[0], images, targets, **options)


def main() -> None:
    # What models print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**content) -> None:
        print(json.dumps(content), file=answers, flush=True)

    def failed(error: Exception) -> None:
        memory = {"out_of_memory": True} if isinstance(error, torch.OutOfMemoryError) else {}
        answer(error=f"{type(error).__name__}: {error}", **memory)

    try:
        step = build_step(sys.argv[1], **json.loads(sys.argv[2]))
    except Exception as error:  # any model's own: told to whoever asked
        failed(error)
        return
    answer(uses_cuda_graphs=step.uses_cuda_graphs)
    for line in sys.stdin:
        try:
            what, _, times = line.strip().partition(" ")
            if what == "peak":
                from bench.memory import measured_peak

                answer(bytes=measured_peak(step))
            else:
                step.repeat(int(times))
                answer()
        except Exception as error:
            failed(error)


if __name__ == "__main__":
    main()
