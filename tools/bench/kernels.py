"""Which kernels a step launches on a GPU, and how long it is busy with them, by PyTorch's profiler. On the CPU, its
operators instead."""

import os
from dataclasses import dataclass

from tables import markdown
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.contenders import Step
from bench.timing import seconds_per_call

STEPS = 3  # profiled
DEAREST = 10
NOTES = (
    f"Per step, the mean of {STEPS} profiled ones. The step's own time is measured without the profiler.",
    "Busy: the kernels' time in the step's. Kernels that overlap count twice. What is not busy is mostly waiting for "
    "Python to launch the next one. Copies and fills of memory count as kernels.",
    "On the CPU: operators of PyTorch, with the time that is their own.",
)


@dataclass
class Kernel:
    """One kernel, by name.

    Attributes:
        launches: per step.
        seconds: per step, of all of them.
    """

    name: str
    launches: float
    seconds: float


@dataclass
class Profile:
    """Of one step of a contender.

    Attributes:
        what: "kernels" or, on the CPU, "operators".
        step_seconds: of a step without the profiler.
        launches: per step, of all kernels.
        seconds: per step, of all kernels.
        dearest: the ten that take longest, the longest first.
    """

    label: str
    what: str
    step_seconds: float
    launches: float
    seconds: float
    dearest: list[Kernel]

    def text(self) -> str:
        """As Markdown."""
        rows = [
            (
                kernel.name[:100],
                f"{kernel.launches:g}",
                f"{1e3 * kernel.seconds:.3f}",
                f"{100 * kernel.seconds / self.seconds:.1f} %" if self.seconds else "-",
            )
            for kernel in self.dearest
        ]
        return (
            f"{self.launches:,.0f} {self.what} per step of {1e3 * self.step_seconds:.2f} ms; they take "
            f"{1e3 * self.seconds:.2f} ms, busy {100 * self.seconds / self.step_seconds:.0f} %.\n\n"
            + markdown((f"the dearest {self.what}", "per step", "ms", "of all"), rows)
        )


def profile_step(step: Step) -> Profile:
    """Profiles a step that has been warmed up."""
    on_cuda = step.device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler complains if there is no GPU
    step_seconds = seconds_per_call(step, STEPS)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
        step.synchronize()
    wanted = DeviceType.CUDA if on_cuda else DeviceType.CPU
    kernels = []
    for event in profiler.key_averages():
        # An optimizer's step, for one, is on the device's time line too, over its kernels.
        if event.device_type == wanted and not event.is_user_annotation:
            microseconds = event.self_device_time_total if on_cuda else event.self_cpu_time_total
            kernels.append(Kernel(event.key, event.count / STEPS, microseconds / STEPS / 1e6))
    kernels.sort(key=lambda kernel: kernel.seconds, reverse=True)
    return Profile(
        step.contender.label,
        "kernels" if on_cuda else "operators",
        step_seconds,
        sum(kernel.launches for kernel in kernels),
        sum(kernel.seconds for kernel in kernels),
        kernels[:DEAREST],
    )
