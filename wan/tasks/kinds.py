"""The kinds of tasks there are, by the name that a task's YAML gives as its `kind`."""

from __future__ import annotations

from easydict import EasyDict

from wan.tasks.animate import Animate
from wan.tasks.image import FirstLast, Image
from wan.tasks.kind import Kind
from wan.tasks.latent import FirstLatent
from wan.tasks.s2v import S2V
from wan.tasks.vace import Vace

KINDS: dict[str, Kind] = {
    "t2v": Kind(),
    "i2v": Image(),
    "flf2v": FirstLast(),
    "ti2v": FirstLatent(),
    "vace": Vace(),
    "s2v": S2V(),
    "animate": Animate(),
}


def kind_of(spec: EasyDict) -> Kind:
    return KINDS[spec.kind]
