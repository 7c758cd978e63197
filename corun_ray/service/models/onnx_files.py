"""A model as one ONNX file, for programs without torch and without this package, and a description of it.

The exported graph is `restore`: it pads images of any size, runs the network, crops and clamps. What surrounds a
network elsewhere in this package is not inside: files are neither read nor written, and large images are not cut.
"""

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from corun_ray.core.errors import UserError
from corun_ray.core.inference.restore import MIN_SIDE_PX, restore
from corun_ray.core.networks.corun import Restoration
from corun_ray.core.networks.spec import NetworkSpec, compute_padded_size
from corun_ray.service.errors import join_lines

if TYPE_CHECKING:
    from onnx import ModelProto

ONNX_FILE = "model.onnx"
DESCRIPTION_FILE = "model.json"
METADATA_KEY = "corun_ray"
"""The entry of the ONNX file's metadata that holds the description too."""

PACKAGES = ("onnx", "onnxscript")
"""What the exporter needs; both are in the package's extra `onnx`."""
OPSET = 20
"""The version of ONNX's operators: the first one with GELU, read by onnxruntime 1.17 and later."""
INPUT_NAME = "hazy"
OUTPUT_NAMES = Restoration._fields
FREE_SIZES = {0: "batch", 2: "height", 3: "width"}
"""The dimensions of all images that a program may choose, and their names in the file."""

TRACED_SHAPE = (2, 3, 72, 56)
"""Images that the network is traced with: padded at both sides, and of a height that is not the width."""
CHECKED_SHAPES = ((1, 3, 61, 100), (2, 3, 96, 64))
"""Images of other sizes, with padding and without, that the file is compared on."""
TOLERANCE = 1e-3
"""The largest difference from torch that may be rounding: a quarter of a level of 8 bits."""
ORT_FATAL = 4
"""onnxruntime's severity of fatal errors."""
MAX_WEIGHT_BYTES = 2_000_000_000
"""An ONNX file is one protobuf message, of at most 2 GiB."""


class OnnxError(UserError):
    """A network that cannot be exported; the message is one line."""


class AnyRestoration(nn.Module):
    """`restore` as a module for the exporter, whose outputs are plain tensors."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, hazy: Tensor) -> tuple[Tensor, ...]:
        """Restore `hazy`, B 3 H W in [0, 1].

        Returns the scene, and the transmission of a network that has one.
        """
        scene, transmission = restore(self.network, hazy)
        return (scene,) if transmission is None else (scene, transmission)


def check_packages() -> None:
    """Refuse to export where the exporter's packages are not installed.

    Raises `OnnxError`.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise OnnxError(f"ONNX needs {' and '.join(missing)}, not installed here: pip install 'corun-ray[onnx]'")


def save_onnx(folder: Path, network: nn.Module, spec: NetworkSpec) -> None:
    """Export a network to `model.onnx` in a folder, with its description in `model.json`.

    `network` is on the CPU in float32 and in eval mode, and `spec` describes it. The file is checked by onnx, and
    where onnxruntime is installed compared with torch. An export takes from seconds to minutes.
    Raises `OnnxError`, before any file is written.
    """
    check_packages()
    import onnx

    # Export, and check the graph and all its shapes.
    model = _export(network)
    onnx.checker.check_model(model, full_check=True)

    # Describe the file, within the file too.
    description = _describe(model, network, spec, _compare(model, network))
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(description)})

    onnx.save(model, folder / ONNX_FILE)
    (folder / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n")


def _export(network: nn.Module) -> "ModelProto":
    """Export a network with free sizes.

    Raises `OnnxError`.
    """
    weight_bytes = sum(tensor.nbytes for tensor in network.state_dict().values())
    if weight_bytes > MAX_WEIGHT_BYTES:
        raise OnnxError(f"its weights of {weight_bytes / 1e9:.1f} GB do not fit into one ONNX file (2 GB)")

    # Trace once, with sizes that stay free wherever the network allows it.
    hazy = torch.rand(TRACED_SHAPE, generator=torch.Generator().manual_seed(0))
    free_sizes = dict.fromkeys(FREE_SIZES, torch.export.Dim.AUTO)
    try:
        with torch.no_grad(), _quiet_exporter():
            names = list(OUTPUT_NAMES[: len(AnyRestoration(network)(hazy))])
            traced = torch.export.export(AnyRestoration(network), (hazy,), dynamic_shapes={INPUT_NAME: free_sizes})
            program = torch.onnx.export(
                traced, input_names=[INPUT_NAME], output_names=names, opset_version=OPSET, verbose=False
            )
    except Exception as error:
        raise OnnxError(f"its graph cannot be exported to ONNX ({_find_reason(error)})") from None

    assert program is not None
    return _clean(program.model_proto)


def _clean(model: "ModelProto") -> "ModelProto":
    """Name the free sizes, and drop what the exporter noted about the code and the machine.

    Raises `OnnxError` where a size is not free.
    """
    for images in [*model.graph.input, *model.graph.output]:
        for dimension, name in FREE_SIZES.items():
            size = images.type.tensor_type.shape.dim[dimension]
            if not size.dim_param:
                raise OnnxError(f"its graph works for one {name} alone ({size.dim_value})")
            size.dim_param = name

    # The notes name source files and their folders; the shapes of intermediate results follow from the operators.
    for node in model.graph.node:
        del node.metadata_props[:]
    for images in [*model.graph.input, *model.graph.output]:
        del images.metadata_props[:]
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]
    del model.graph.metadata_props[:], model.metadata_props[:], model.graph.value_info[:]
    return model


def _compare(model: "ModelProto", network: nn.Module) -> dict[str, float] | None:
    """Return the largest difference of each output from torch, on random images.

    None: onnxruntime is not installed. Raises `OnnxError` where the difference is more than rounding.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    # onnxruntime also prints the errors that it raises, unless it prints fatal ones alone.
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ORT_FATAL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    largest = dict.fromkeys(names, 0.0)

    generator = torch.Generator().manual_seed(1)
    for shape in CHECKED_SHAPES:
        hazy = torch.rand(shape, generator=generator)
        size = f"a batch of {shape[0]}, {shape[3]} x {shape[2]} px"
        try:
            outputs = session.run(names, {INPUT_NAME: hazy.numpy()})
        except Exception:
            raise OnnxError(f"its graph works for some sizes only, not for {size}") from None

        expected = restore(network, hazy)._asdict()
        for name, found in zip(names, outputs, strict=True):
            if found.shape != expected[name].shape:
                raise OnnxError(f"its graph works for some sizes only: {size} comes out as {found.shape}")
            difference = (torch.from_numpy(found) - expected[name]).abs().max().item()
            largest[name] = max(largest[name], difference)

    # `not <=` also refuses NaN.
    for name, difference in largest.items():
        if not difference <= TOLERANCE:
            raise OnnxError(f"its graph gives another {name} than torch: they differ by up to {difference:.2g}")
    return largest


def _describe(
    model: "ModelProto", network: nn.Module, spec: NetworkSpec, largest_difference: dict[str, float] | None
) -> dict[str, Any]:
    """Return what a program must know to use the file, as plain JSON values."""
    multiple_px, _ = compute_padded_size(network, 1, 1)
    images: dict[str, Any] = {"type": "float32", "range": [0, 1]}
    outputs = {"scene": images | {"shape": ["batch", 3, "height", "width"], "colours": "RGB"}}
    if len(model.graph.output) > 1:
        outputs["transmission"] = images | {"shape": ["batch", 1, "height", "width"], "clear_air": 1}

    return {
        "network": {"type": spec.type, "args": spec.args},
        "opset": OPSET,
        "inputs": {INPUT_NAME: images | {"shape": ["batch", 3, "height", "width"], "colours": "RGB"}},
        "outputs": outputs,
        "any_size_from_px": MIN_SIDE_PX,
        "inside": f"padding by reflection to multiples of {multiple_px} px, cropping, clamping of the scene",
        "not_inside": "reading and writing of files, bands or tiles for images larger than memory, self-ensemble",
        "largest_difference_from_torch": largest_difference,
    }


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep the exporter's warnings, notes and graphs from the console; failures are raised."""
    logging.disable(logging.WARNING)
    noise = io.StringIO()
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(noise),
            contextlib.redirect_stderr(noise),
        ):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _find_reason(error: BaseException) -> str:
    """Return the error that an exporter's chain of errors began with, as one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {join_lines(str(error))}"
