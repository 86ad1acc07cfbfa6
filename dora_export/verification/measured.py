"""What running models measured, and what can keep it from measuring: plain data, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dora_export.verification.parity import Choices, Compared, Distance

if TYPE_CHECKING:
    from dora_export.verification.hypotheses import Leaning

Progress = Callable[[int, int], None]


def library_of(config: Mapping[str, Any]) -> str:
    """Return the name of the library that runs a model of this config."""
    return "diffusers" if "_class_name" in config else "transformers"


class Unsupported(Exception):  # noqa: N818 - a finding, not an error of the program
    """Something that the forward pass cannot be checked for.

    Attributes:
        where: Tensor, class or file.
        what: What about it, a clause.
    """

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")
        self.where, self.what = where, what


class LoadFailure(Exception):  # noqa: N818 - a finding, not an error of the program
    """The library does not load a folder, or not all of it; the message says why."""


@dataclass
class Layer:
    """A changed weight's outputs on the inputs it met.

    Attributes:
        name: The weight's tensor.
        unit: Unit roundoff of its storage type.
        error: The merged weight's outputs from the unmerged ones.
        noise: The unmerged ones in storage precision from the same in high precision.
        effect: The base's outputs from those with the adapter.
    """

    name: str
    unit: float
    error: Distance = field(default_factory=Distance)
    noise: Distance = field(default_factory=Distance)
    effect: Distance = field(default_factory=Distance)


@dataclass(frozen=True)
class Opinion:
    """What PEFT's active adapter computes.

    Attributes:
        error: Its outputs from the reference's, by name; empty where it could not be asked.
        said: Why it could not.
    """

    error: Mapping[str, Compared] = field(default_factory=dict)
    said: str = ""


@dataclass(frozen=True)
class Measured:
    """What the merged and the unmerged model did on the same inputs.

    Attributes:
        model: Name of the class that was run.
        precision: High precision, as torch names it.
        storage: Storage precision whose noise was measured.
        unit: Unit roundoff of ``storage``.
        inputs: Names and shapes of what they were run on.
        places: How many tensors were found by name, by the end of it, by content.
        random: Parameters that the base does not store; all runs had the same random values.
        misfits: How the names and shapes of outputs differ; nothing else was measured then.
        layers: Every changed weight that was multiplied by.
        idle: Changed weights that no input reached.
        error: The merged model's outputs from the reference's, by name.
        noise: The reference's in storage precision from those in high precision.
        effect: The base's from the reference's; empty where there is nothing to compare.
        text: Choices at the tokens that the reference wrote, or None.
        opinion: PEFT's.
    """

    model: str
    precision: str
    storage: str
    unit: float
    inputs: Sequence[Mapping[str, Any]]
    places: Mapping[str, int]
    random: Sequence[str]
    misfits: Sequence[str]
    layers: Sequence[Layer] = ()
    idle: Sequence[str] = ()
    error: Mapping[str, Compared] = field(default_factory=dict)
    noise: Mapping[str, Compared] = field(default_factory=dict)
    effect: Mapping[str, Compared] = field(default_factory=dict)
    text: Choices | None = None
    opinion: Opinion = field(default_factory=Opinion)


@dataclass(frozen=True)
class GraphMeasured:
    """What a graph and its reference did on the same inputs.

    Attributes:
        precision: Of the reference, as torch names it.
        storage: Precision whose noise was measured.
        unit: Unit roundoff of ``storage``.
        merged_in: Type that the graph's merged weights were rounded to; None: not told by them.
        graph: Type of the graph's weights; None: quantised.
        misnamed: Inputs and outputs that are not the model's; nothing else was measured then.
        misfits: How the shapes of outputs differ; as above.
        calls: What both sides were asked.
        error: The graph's outputs from the reference's, by name.
        noise: The reference's in ``storage`` from those in high precision, or the quantised graph
            of the base from the base; empty with a budget.
        noise_of_base: Whether it is the latter.
        effect: The base's from the reference's; empty where the base cannot take the inputs.
        leanings: Known mistake -> where the graph's outputs lie on the way to it.
        text: Choices at the tokens that the reference wrote one by one, or None.
    """

    precision: str = ""
    storage: str = ""
    unit: float = 0.0
    merged_in: str | None = None
    graph: str | None = None
    misnamed: Sequence[str] = ()
    misfits: Sequence[str] = ()
    calls: Sequence[Mapping[str, Any]] = ()
    error: Mapping[str, Compared] = field(default_factory=dict)
    noise: Mapping[str, Compared] = field(default_factory=dict)
    effect: Mapping[str, Compared] = field(default_factory=dict)
    noise_of_base: bool = False
    leanings: Mapping[str, Leaning] = field(default_factory=dict)
    text: Choices | None = None
