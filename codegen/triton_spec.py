"""The spec of one generated Triton file: everything that is compiled into it. T (tokens) is not, K is only expected.

Letters: T tokens, N experts, K chosen, D hidden, I expert width, S shared width; G = 2 for a gated FFN, 1 for a plain one.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from .spec import ExpertKernelSpec

DTYPES = {"float32": 4, "float16": 2, "bfloat16": 2}  # name -> bytes of an element
WEIGHT_FORMATS = ("same", "fp8", "int8", "int4")
PRECISIONS = ("ieee", "tf32")
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Target:
    """A kind of device.

    Attributes:
        backend: ``cuda`` or ``hip``.
        arch: compute capability times ten (80, 90, 100), or AMD's name (``gfx942``).
    """

    backend: str
    arch: int | str

    @classmethod
    def parse(cls, text: str) -> Target:
        """From ``cuda:90`` or ``hip:gfx942``.

        Raises:
            ValueError: the text is neither.
        """
        backend, _, arch = text.partition(":")
        if backend == "cuda" and re.fullmatch(r"\d{2,3}", arch) and int(arch) >= 80:
            return cls("cuda", int(arch))
        if backend == "hip" and re.fullmatch(r"gfx[0-9a-f]{3,4}", arch):
            return cls("hip", arch)
        raise ValueError(f"'{text}' is no target; say cuda:80, cuda:90, cuda:100, hip:gfx942 or hip:gfx1100")

    def __str__(self) -> str:
        return f"{self.backend}:{self.arch}"

    @property
    def lanes(self) -> int:
        """Threads of a warp: 64 on AMD's data centre devices (gfx9), 32 elsewhere."""
        return 64 if str(self.arch).startswith("gfx9") else 32


@dataclass(frozen=True)
class TritonSpec:
    """One expert FFN with what surrounds it, forward or backward.

        y_t = sum_k w_tk (W2_e h_tk + b2_e) + shared(x_t) + b,   h = act(G x + bg) * (U x + bu),   e = ids_tk

    Attributes:
        hidden_size: D.
        expert_width: I.
        experts: N.
        top_k: K that is expected; every K will do.
        gated: whether there is a gate projection.
        activation: a name or expression of :mod:`moecompile.activations`.
        dtype: of x and y, and of weights in the format ``same``.
        weight_format: how the experts' matrices are stored: ``same`` as dtype; ``fp8``, float8_e4m3fn with a scale per row;
            ``int8`` with a scale per row or group; ``int4``, two a byte (element 2j in the low half, value + 8), likewise.
        group_size: elements of a row that share a scale, a power of two of at least 32 (the last group of a row may be
            shorter); 0 means the whole row.
        precision: of float32 products, ``ieee`` or ``tf32`` (tensor cores, 10 bits of mantissa).
        weighted: whether there are routing weights; without them every weight is 1 and costs nothing.
        up_bias, down_bias: whether experts have biases (N, G*I) and (N, D).
        shared_width: S, neurons of dtype that every token uses, in the same launches; 0 for none.
        shared_bias: whether they have input biases.
        output_bias: whether a bias (D,) is added to y.
        direction: ``forward``, or ``backward`` for both.
        target: the kind of device that the launch constants are for.

    Raises:
        ValueError: a field holds what no kernel has.
    """

    hidden_size: int
    expert_width: int
    experts: int
    top_k: int
    gated: bool
    activation: str
    dtype: str = "bfloat16"
    weight_format: str = "same"
    group_size: int = 0
    precision: str = "ieee"
    weighted: bool = True
    up_bias: bool = False
    down_bias: bool = False
    shared_width: int = 0
    shared_bias: bool = False
    output_bias: bool = False
    direction: str = "forward"
    target: Target = Target("cuda", 90)

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dtype", tuple(DTYPES)),
            ("weight_format", WEIGHT_FORMATS),
            ("precision", PRECISIONS),
            ("direction", DIRECTIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is '{getattr(self, name)}'; there are: {', '.join(allowed)}")
        if min(self.hidden_size, self.expert_width, self.experts) < 1 or min(self.shared_width, self.top_k) < 0:
            raise ValueError("there is no kernel for experts without neurons or inputs: sizes must be positive")
        if max(self.rows, self.hidden_size) * max(self.hidden_size, self.expert_width) >= 2**31:
            raise ValueError("an expert's matrix has 2^31 elements or more")
        if self.precision == "tf32" and self.dtype != "float32":
            raise ValueError(f"precision 'tf32' is one of float32 products, not of {self.dtype}")
        if self.shared_bias and not self.shared_width:
            raise ValueError("shared_bias without shared neurons")
        self._check_format()

    def _check_format(self) -> None:
        group = self.group_size
        if group and self.weight_format not in ("int8", "int4"):
            raise ValueError(f"weights in the format '{self.weight_format}' have no groups")
        if group and (group < 32 or group & (group - 1)):
            raise ValueError(f"group_size is {group}; it must be 0 or a power of two of at least 32")
        for size in (self.hidden_size, self.expert_width):
            if self.weight_format == "int4" and size % 2:
                raise ValueError(f"rows of {size} elements do not divide into bytes")
        if self.direction == "backward" and (self.weight_format != "same" or self.shared_width or self.output_bias):
            raise ValueError("there is no backward kernel for quantised weights or shared neurons")

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of x."""
        return DTYPES[self.dtype]

    @property
    def rows(self) -> int:
        """G*I."""
        return self.expert_width * (2 if self.gated else 1)

    @property
    def quantised(self) -> bool:
        """Whether weights carry scales."""
        return self.weight_format != "same"

    @property
    def costs(self) -> ExpertKernelSpec:
        """What the routed experts must cost at least (quantised weights: without their scales, int4 as one byte)."""
        size = 1 if self.quantised else self.element_bytes
        return ExpertKernelSpec(
            self.hidden_size, self.expert_width, self.experts, self.top_k, self.gated, self.activation, size
        )

    @property
    def name(self) -> str:
        """A name for people and files; different specs have different ones."""
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:8]
        shape = f"d{self.hidden_size}_i{self.expert_width}_n{self.experts}_k{self.top_k}"
        kind = f"{self.dtype}{'' if self.weight_format == 'same' else '_' + self.weight_format}"
        return f"expert_ffn_{shape}_{kind}_{self.target.backend}{self.target.arch}_{digest}"
