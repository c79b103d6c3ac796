"""How the variants of ScanObjectNN draw the boxes that cut objects out of their scenes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Perturbation:
    """How a variant draws the box that is cut out of the scene.

    Attributes:
        shift: largest translation along each axis, as a share of the box's size.
        turn: rotate the box about the vertical.
        stretch: each size is multiplied by a factor in [1 - stretch, 1 + stretch].
    """

    shift: float = 0.0
    turn: bool = False
    stretch: float = 0.0


PERTURBATIONS = {
    "OBJ_BG": Perturbation(),
    "PB_T25": Perturbation(0.25),
    "PB_T25_R": Perturbation(0.25, turn=True),
    "PB_T50_R": Perturbation(0.5, turn=True),
    "PB_T50_RS": Perturbation(0.5, turn=True, stretch=0.25),
}
"""What the variants of ScanObjectNN do to their boxes; `scanobjectnn.VARIANTS` names their files."""
