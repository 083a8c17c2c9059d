"""Make torchvision importable beside a CPU build of torch.

torchvision's published wheels are built against CUDA. Beside a CPU torch their compiled operators do not load, and
`import torchvision` fails on the two operators it registers unguarded. Declaring them lets the import go through;
nothing here calls them.
"""

import sys

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

try:
    import torchvision
except RuntimeError as error:
    if "operator torchvision::" not in str(error):
        raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _library = torch.library.Library("torchvision", "FRAGMENT")  # kept alive: declarations go when it does
    for schema in SCHEMAS:
        _library.define(schema)
    import torchvision  # noqa: F401
