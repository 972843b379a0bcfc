"""Files that hold a model without its Python code: one `Format` per kind, which writes and loads it.

All take a batch (N, 3, H, W) of any size as `images` and give `logits` (N, classes), float32.
"""

import json
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

# All versions of PyTorch's exporter write this opset. Others are converted from it, and fewer runtimes read them.
OPSET = 18

Run = Callable[[Tensor], Tensor]


@contextmanager
def quiet():
    """Hides the warnings of exporters and quantisers. Whoever uses what they make compares its logits."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def first_line(error: BaseException) -> str:
    """The type and first line of what an error was caused by, for exporters raise anything, of any length."""
    while error.__cause__:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def program_of(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """The model as torch.export traces it, for batches of any size."""
    with torch.no_grad():
        return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write_onnx(model: nn.Module, images: Tensor, path: Path, properties: Mapping[str, str]) -> None:
    """Writes the model as one ONNX file. Raises any exception of the exporter.

    Args:
        model: on the CPU, in evaluation mode.
        images: an example, of a batch other than 1, which torch.export would take for a constant.
        properties: for whoever opens the file.
    """
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        opset_version=OPSET,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    for node in program.model.graph:
        node.metadata_props.clear()  # source lines of the model's code, a fifth of a small file
    program.model.metadata_props.update(properties)
    program.save(path)


def write_program(model: nn.Module, images: Tensor, path: Path, properties: Mapping[str, str]) -> None:
    """Writes the model as a program of torch.export, otherwise as `write_onnx`."""
    torch.export.save(program_of(model, images), path, extra_files={"metadata.json": json.dumps(properties)})


def write_package(model: nn.Module, images: Tensor, path: Path, properties: Mapping[str, str]) -> None:
    """Writes the model compiled by inductor for this kind of processor, with its weights laid out for it, otherwise as
    `write_onnx`. Takes minutes and a C++ compiler.

    What runs it must give it images in the memory format of the example: it does not check their strides.
    """
    options = {"freezing": True, "aot_inductor.metadata": dict(properties)}
    torch._inductor.aoti_compile_and_package(
        program_of(model, images), package_path=str(path), inductor_configs=options
    )


def write_openvino(model: nn.Module, images: Tensor, path: Path, properties: Mapping[str, str]) -> None:
    """Writes the model for OpenVINO, in float32: `path`, and the weights beside it, whose name ends in .bin. Otherwise
    as `write_onnx`."""
    import openvino

    converted = convert_to_openvino(model, images)
    for name, value in properties.items():
        converted.set_rt_info(value, name)
    openvino.save_model(converted, path, compress_to_fp16=False)


def convert_to_openvino(model: nn.Module, images: Tensor):
    """The model as an `openvino.Model` for batches of any size. Raises any exception of the exporter."""
    import openvino
    from openvino import opset13
    from openvino.frontend import ConversionExtension

    def addmv(node) -> list:
        """OpenVINO's converter does not know this operation: bias + matrix @ vector."""
        product = opset13.matmul(node.get_input(1), node.get_input(2), False, False)
        return [opset13.add(node.get_input(0), product).output(0)]

    shape = openvino.PartialShape([-1, *images.shape[1:]])
    with torch.no_grad():  # in a quarter of the time that a program of torch.export takes
        traced = torch.jit.trace(model, images, check_trace=False)
    extension = ConversionExtension("aten::addmv", addmv)
    converted = openvino.convert_model(traced, input=[shape], extension=extension)
    converted.inputs[0].get_tensor().set_names({"images"})
    converted.outputs[0].get_tensor().set_names({"logits"})
    return converted


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def load_onnx(path: Path) -> Run:
    """An ONNX file on the CPU, on as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def load_program(path: Path) -> Run:
    """A program of torch.export, otherwise as `load_onnx`."""
    with quiet():
        return torch.export.load(path).module()


def load_package(path: Path) -> Run:
    """A compiled package, otherwise as `load_onnx`."""
    with quiet():
        return torch._inductor.aoti_load_package(str(path))


def load_openvino(path: Path) -> Run:
    """A file of OpenVINO, otherwise as `load_onnx`."""
    import openvino

    return compile_openvino(openvino.Core().read_model(path))


def compile_openvino(model, batch: int | None = None) -> Run:
    """An `openvino.Model` on the CPU, in float32, on as many threads as PyTorch has.

    Args:
        batch: the only size that it will be given, for which it is faster. The model is changed to it.
    """
    import openvino

    if batch:
        model.reshape([batch, *model.input(0).partial_shape[1:]])
    # Without the hint, it computes in bfloat16 where the processor has instructions for it.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    # A copy, because the next call writes over the output.
    return lambda images: torch.from_numpy(request.infer([images.numpy()])[0].copy())


class Format(NamedTuple):
    """A kind of file.

    Attributes:
        write: see `write_onnx`.
        load: see `load_onnx`.
        title: for tables.
        packages: that it needs, in requirements/export.txt.
    """

    write: Callable[[nn.Module, Tensor, Path, Mapping[str, str]], None]
    load: Callable[[Path], Run]
    title: str
    packages: Sequence[str] = ()


FORMATS = {
    "onnx": Format(write_onnx, load_onnx, "ONNX", ("onnx", "onnxscript", "onnxruntime")),
    "openvino": Format(write_openvino, load_openvino, "OpenVINO", ("openvino",)),
    "torch": Format(write_program, load_program, "torch.export"),
    "aoti": Format(write_package, load_package, "compiled package"),
}
