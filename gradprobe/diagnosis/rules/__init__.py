"""The rules of the diagnosis. Each is a pure function of a run's history and needs no torch."""

from gradprobe.diagnosis.rules.accumulation import GRADIENTS_NOT_CLEARED
from gradprobe.diagnosis.rules.activations import DEAD_RELU, EXPLODING_FORWARD, POOR_INITIALISATION, SATURATION
from gradprobe.diagnosis.rules.gradients import DRIFT, DYING, EXPLODING, NON_FINITE, SILENT, VANISHING
from gradprobe.diagnosis.rules.loss import LOSS_BLOW_UP, NOT_LEARNING, SPIKE, UNSTABLE_LOSS
from gradprobe.diagnosis.rules.precision import PRECISION_LOSS
from gradprobe.diagnosis.rules.replicas import REPLICAS_DIFFER
from gradprobe.diagnosis.rules.rule import Rule
from gradprobe.diagnosis.rules.updates import UPDATES_TOO_LARGE, UPDATES_TOO_SMALL

RULES: tuple[Rule, ...] = (
    NON_FINITE,
    REPLICAS_DIFFER,
    GRADIENTS_NOT_CLEARED,
    LOSS_BLOW_UP,
    EXPLODING,
    EXPLODING_FORWARD,
    VANISHING,
    POOR_INITIALISATION,
    SATURATION,
    DEAD_RELU,
    DYING,
    SILENT,
    DRIFT,
    PRECISION_LOSS,
    UPDATES_TOO_LARGE,
    UPDATES_TOO_SMALL,
    UNSTABLE_LOSS,
    NOT_LEARNING,
    SPIKE,
)  # most severe first
