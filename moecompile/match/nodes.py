"""Reading single graph nodes: which are linear layers, which only pass a tensor on, which mix features."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int}
SQUEEZES = {aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims}
PASS_ON = {aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default}
CASTS = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.type_as.default,
    aten.float.default if hasattr(aten, "float") else None,
} - {None}
DROPOUTS = {aten.dropout.default, aten.dropout_.default, aten.native_dropout.default, aten.feature_dropout.default}
NORMS = {
    aten.layer_norm.default: "a layer normalisation",
    aten.native_layer_norm.default: "a layer normalisation",
    aten.group_norm.default: "a group normalisation",
    aten.batch_norm.default: "a batch normalisation",
    aten.rms_norm.default: "an RMS normalisation",
    aten.linalg_vector_norm.default: "a norm",
    aten.mean.dim: "a mean over features (a normalisation)",
    aten.sum.dim_IntList: "a sum over features",
    aten.var.correction: "a variance over features (a normalisation)",
    aten.softmax.int: "a softmax",
    aten._softmax.default: "a softmax",
    aten.log_softmax.int: "a log-softmax",
    aten.cumsum.default: "a cumulative sum",
    aten.topk.default: "a top-k",
}
ASSERTS = {aten._assert_tensor_metadata.default}


def is_call(node: Any, targets: Any) -> bool:
    """Whether a node calls one of the targets."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def value_of(node: fx.Node) -> Tensor | None:
    """The fake tensor that a node makes, if it makes one."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def attribute(module: torch.nn.Module, path: object) -> Any:
    """What a get_attr node's target names in its graph module."""
    value: Any = module
    for part in str(path).split("."):
        value = getattr(value, part)
    return value


def last_size(node: fx.Node) -> int | None:
    """The static size of a node's last dimension."""
    value = value_of(node)
    if value is None or value.dim() == 0 or not isinstance(value.shape[-1], int):
        return None
    return int(value.shape[-1])


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes make tensors of one shape."""
    left, right = value_of(a), value_of(b)
    return left is not None and right is not None and left.shape == right.shape


def module_paths(node: fx.Node) -> list[str]:
    """The modules in whose forward a node was made, outermost first (the root, "", left out)."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]).split("@")[0].removeprefix("L['self'].") for entry in stack.values()]
    return [path for path in paths if path and path != "L['self']"]


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def dropout_probability(node: fx.Node) -> tuple[float, bool]:
    """(p, whether it is active) of a dropout node."""
    return float(argument(node, 1, "p", 0.5)), bool(argument(node, 2, "train", False))


def passes_on(node: fx.Node) -> bool:
    """Whether a node hands on its first argument's values, feature by feature (inactive dropout, cast, view by tokens)."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target in PASS_ON:
        return True
    if node.target in CASTS:
        value, source = value_of(node), value_of(node.args[0])
        return value is not None and source is not None and value.is_floating_point() and source.is_floating_point()
    if node.target in DROPOUTS:
        probability, active = dropout_probability(node)
        return not active or probability == 0.0
    if node.target in RESHAPES or node.target in SQUEEZES:
        size = last_size(node)
        return size is not None and size == last_size(node.args[0])
    return False


def strip(node: fx.Node, region: set[fx.Node] | None = None) -> fx.Node:
    """Walk back over nodes that only pass a tensor on; they are added to ``region``."""
    while passes_on(node):
        if region is not None:
            region.add(node)
        node = node.args[0]  # type: ignore[assignment]
    return node


@dataclass(frozen=True)
class LinearNode:
    """A node that multiplies by a weight: y = x W^T + b.

    Attributes:
        node: the node whose value is the result, bias included.
        x: the input node.
        weight: the weight's node; a parameter when its op is get_attr.
        bias: the bias's node or None.
        transposed: the weight is stored (in, out).
        inner: nodes that belong to it besides ``node`` (the product under a separate bias add).
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    inner: tuple[fx.Node, ...] = ()

    @property
    def out_features(self) -> int | None:
        """Output width, when static."""
        return last_size(self.node)


def _matrix(node: Any) -> fx.Node | None:
    """The get_attr node of a 2-D parameter behind ``node`` (through a transpose), or None."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    return node if value is not None and value.dim() == 2 and node.op == "get_attr" else None


def _untransposed(node: Any) -> tuple[Any, bool]:
    """(inner node, was transposed) of a ``w.t()`` or ``w.transpose(0, 1)``."""
    if is_call(node, {aten.t.default, aten.numpy_T.default}):
        return node.args[0], True
    if is_call(node, {aten.transpose.int}) and {argument(node, 1, "dim0"), argument(node, 2, "dim1")} <= {0, 1, -1, -2}:
        return node.args[0], True
    if is_call(node, {aten.permute.default}) and list(argument(node, 1, "dims")) in ([1, 0], [-1, -2]):
        return node.args[0], True
    return node, False


def as_linear(node: Any) -> LinearNode | None:
    """Read a node as a linear layer: linear, addmm, mm/matmul by a parameter, each with or without a separate bias add.

    A weight that is computed (not a parameter) is still reported for ``aten.linear``, so that the refusal can name it.
    """
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if node.target is aten.linear.default:
        bias = argument(node, 2, "bias")
        return LinearNode(node, node.args[0], node.args[1], bias, transposed=False)  # type: ignore[arg-type]
    if node.target is aten.addmm.default:
        bias, x, right = node.args[:3]
        if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
            return None
        weight, turned = _untransposed(right)
        if _matrix(weight) is None or not (isinstance(bias, fx.Node) and bias.op == "get_attr"):
            return None
        inner = (right,) if turned else ()
        return LinearNode(node, x, weight, bias, transposed=not turned, inner=inner)  # type: ignore[arg-type]
    if node.target in {aten.mm.default, aten.matmul.default}:
        x, right = node.args[:2]
        weight, turned = _untransposed(right)
        if _matrix(weight) is None or not isinstance(x, fx.Node):
            return None
        inner = (right,) if turned else ()
        return LinearNode(node, x, weight, None, transposed=not turned, inner=inner)  # type: ignore[arg-type]
    if node.target in {aten.add.Tensor, aten.add_.Tensor} and node.kwargs.get("alpha", 1) == 1:
        for product, bias in (node.args[:2], node.args[1::-1]):
            if isinstance(bias, fx.Node) and bias.op == "get_attr" and isinstance(product, fx.Node):
                value, linear = value_of(bias), as_linear(product)
                if linear is None or linear.bias is not None or value is None or value.dim() != 1:
                    continue
                if value.shape[0] == last_size(product):
                    return LinearNode(node, linear.x, linear.weight, bias, linear.transposed, (*linear.inner, linear.node))
    return None


def as_rows(node: fx.Node) -> tuple[fx.Node, tuple[int, int, int], tuple[fx.Node, ...]] | None:
    """Read a node as a slice of features: (source, (start, stop, step), nodes in between), for chunk, split and slice."""
    if is_call(node, {operator.getitem}) and isinstance(node.args[0], fx.Node):
        many, index = node.args[0], node.args[1]
        if not isinstance(index, int) or many.op != "call_function" or not many.args:
            return None
        source = many.args[0]
        width = last_size(source) if isinstance(source, fx.Node) else None
        value = value_of(source) if isinstance(source, fx.Node) else None
        if width is None or value is None:
            return None
        axis = argument(many, 2, "dim", 0)
        if axis not in (-1, value.dim() - 1):
            return None
        if many.target is aten.chunk.default:
            size = -(-width // int(argument(many, 1, "chunks")))
            sizes = [min(size, width - start) for start in range(0, width, size)]
        elif many.target is aten.split.Tensor:
            size = int(argument(many, 1, "split_size"))
            sizes = [min(size, width - start) for start in range(0, width, size)]
        elif many.target in {aten.split_with_sizes.default, aten.split.sizes}:
            sizes = [int(size) for size in argument(many, 1, "split_sizes")]
        else:
            return None
        if not -len(sizes) <= index < len(sizes):
            return None
        index %= len(sizes)
        start = sum(sizes[:index])
        return source, (start, start + sizes[index], 1), (node, many)  # type: ignore[return-value]
    if is_call(node, {aten.slice.Tensor}) and isinstance(node.args[0], fx.Node):
        source, value = node.args[0], value_of(node.args[0])
        width = last_size(source)
        axis = argument(node, 1, "dim", 0)
        if value is None or width is None or axis not in (-1, value.dim() - 1):
            return None
        start, stop, step = argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
        try:
            window = slice(start, stop, step).indices(width)
        except TypeError:
            return None
        return source, window, (node,)
    return None
