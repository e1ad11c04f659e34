"""The conversion table's row: one parameter of ours and its Hugging Face tensors, read in both directions."""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np
from einops import rearrange


@dataclasses.dataclass(frozen=True)
class Row:
    """Our dotted `path`, the Hugging Face `name` ({l} = layer number) and the axes of both, "theirs -> ours".

    The right side of `axes` also names the axes for the sharding table, so conversion and sharding read one row.
    """

    path: str
    name: str
    axes: str
    untied_only: bool = False

    @property
    def stacked(self) -> bool:
        """Whether ours stacks the tensors of all layers along a leading axis L."""
        return "{l}" in self.name

    @property
    def letters(self) -> str:
        """Our shape letters, such as "L D N H"."""
        ours = self.axes.split("->")[1].strip()
        return f"L {ours}" if self.stacked else ours

    def names(self, sizes: Mapping[str, int]) -> list[str]:
        """Return the Hugging Face tensors that make up this parameter, in layer order."""
        return [self.name.format(l=layer) for layer in range(sizes["L"])] if self.stacked else [self.name]

    @property
    def their_axes(self) -> list[str]:
        """The axes of each Hugging Face tensor, several letters where ours are one of theirs: ["N H", "D"]."""
        groups = re.findall(r"\(([^)]*)\)|(\S+)", self.axes.split("->")[0])
        return [inside or single for inside, single in groups]

    def their_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape that each Hugging Face tensor must have."""
        return tuple(math.prod(sizes[letter] for letter in axis.split()) for axis in self.their_axes)

    def our_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape of our parameter, layers stacked."""
        return tuple(sizes[letter] for letter in self.letters.split())

    def to_ours(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Return one Hugging Face tensor with our axes (of one layer)."""
        return rearrange(tensor, self.axes, **self._named(sizes))

    def to_theirs(self, array: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """Return one layer of our parameter with Hugging Face's axes."""
        theirs, ours = (side.strip() for side in self.axes.split("->"))
        return np.ascontiguousarray(rearrange(array, f"{ours} -> {theirs}", **self._named(sizes)))

    def _named(self, sizes: Mapping[str, int]) -> dict[str, int]:
        return {letter: sizes[letter] for letter in re.findall(r"[A-Z]", self.axes.split("->")[1])}
