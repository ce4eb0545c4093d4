"""What a planted bug is made of."""

from collections.abc import Callable
from typing import NamedTuple

Patch = Callable[[object, str, object], None]  # (owner, attribute, value); undone when the plant is taken out


class Plant(NamedTuple):
    """A known bug of FixMatch ports, as a change to the production code."""

    name: str
    stage: str  # the first stage that must fail
    what: str
    put_in: Callable[[Patch], None]
    kind: str = ""  # the part of the trainer that it is in: the file of this package that holds it
    arch: str = "wideresnet"  # the network on which it shows
    cpu_kernels: str = "auto"  # and the setting of runtime.cpu_kernels
    settings: tuple[str, ...] = ()  # and other settings, "section.key=value"
