"""The limits that the rules of the diagnosis compare with."""

from __future__ import annotations

from dataclasses import dataclass

from gradprobe.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Limits of the rules.

    Attributes:
        vanishing_ratio: beta1: ratio of first to last norm below which a gradient may be vanishing.
        vanishing_norm: beta2: norm of the first layer below which it is then judged vanishing.
        exploding_ratio: beta3: ratio of first to last norm above which a gradient is exploding; also the ratio of last
            to first RMS above which the forward pass is exploding.
        slope_sites: Number of weights between the first and the last needed to fit a line to their norms.
        slope_errors: Number of standard errors by which the line must rise or fall.
        loss_limit: Loss at or above which training has blown up.
        dying_share: gamma: share of gradient elements that are exactly zero at or above which a layer is dying.
        dying_sites: Share of the weights that must be dying; always at least two weights.
        drift_fall: Multiple of its own running mean below which a layer's norm, relative to the others, has fallen.
        drift_rise: Multiple of that mean above which the norm has risen.
        variance_ratio: Ratio of the largest to the smallest variance of the layers' outputs above which an
            initialisation is poor.
        dead_activity: A ReLU active less than this share of the time is dead.
        dead_share: Share of a layer's ReLUs that must be dead.
        saturated_slope: Mean derivative of a tanh or sigmoid, relative to its largest, below which it is saturated.
        subnormal_share: Share of a gradient's nonzero values below the smallest normal number of their dtype, above
            which precision is lost.
        update_ratio_high: Ratio of the norm of an update to the norm of its weight above which it is too large.
        update_ratio_low: The same ratio below which it is too small.
        early_update_ratio: The same ratio above which, in the median over the weights and the first `window` observed
            steps, it is too large if the loss rises meanwhile; 0.12 to 0.18 at 100 times the usual rate of AdamW.
        early_rise: Multiple of the first loss that the loss of one of these steps must exceed; 1.2 and more at such a
            rate, at most 1.04 in healthy runs.
        successive_ratio: Mean square of the successive differences of a gradient's mean over its variance below which
            the gradients add up from step to step; independent ones have 2.
        lost_share: Share of a weight's elements that have a gradient and do not move, above which updates are lost.
        spike_sigmas: Standard deviations above the mean of the preceding steps.
        spike_jump: Multiple of the largest of the last `window` losses that a spike must exceed too; a slow rise does
            not.
        spike_norm_jump: The same for the total norm, which jumps more; healthy recurrent networks reach 2.6.
        spike_log_sigmas: The same as spike_sigmas for the logarithms: at a plateau near zero, values are far from
            normally distributed.
        spike_window: Number of preceding steps that count.
        spike_warm_up: Number of preceding steps needed.
        window: Number of losses averaged at the start and at the end; also the number of steps in which a fault must
            persist.
        converging: Ratio of final to initial loss below which training converges, so that ratios over depth are
            not a fault; also the ratio of a low block of losses to a high one in an unstable loss.
        swing_errors: Standard errors by which the loss must fall or rise to be unstable; noise stayed below in 200 of
            200 histories of 1,000 steps.
        drop_errors: Standard errors by which the loss must have dropped to count as learning; noise alone does that in
            one of 260 runs (Student's t, 18 degrees of freedom).
        guess_low: Multiple of the cross-entropy of a uniform guess from which on a level loss shows that nothing is
            learned; the floor of smoothed labels (0.5 of the weight) was at 0.79, untrained networks above 0.98.
        guess_high: The multiple up to which it does; untrained networks reached 1.5.

    Raises:
        ArgumentError: A number of steps or weights is too small.
    """

    vanishing_ratio: float = 1e-3
    vanishing_norm: float = 1e-4
    exploding_ratio: float = 70.0
    slope_sites: int = 10
    slope_errors: float = 3.0
    loss_limit: float = 1e3
    dying_share: float = 0.7
    dying_sites: float = 0.25
    drift_fall: float = 1e-3
    drift_rise: float = 70.0
    variance_ratio: float = 1e5
    dead_activity: float = 0.01
    dead_share: float = 0.5
    saturated_slope: float = 0.05
    subnormal_share: float = 0.5
    update_ratio_high: float = 10.0
    update_ratio_low: float = 1e-8
    early_update_ratio: float = 0.1
    early_rise: float = 1.15
    successive_ratio: float = 0.5
    lost_share: float = 0.5
    spike_sigmas: float = 7.0
    spike_jump: float = 2.0
    spike_norm_jump: float = 3.0
    spike_log_sigmas: float = 5.0
    spike_window: int = 1000
    spike_warm_up: int = 20
    window: int = 10
    converging: float = 0.8
    swing_errors: float = 8.0
    drop_errors: float = 3.0
    guess_low: float = 0.95
    guess_high: float = 2.0

    def __post_init__(self) -> None:
        for name, least in (("window", 2), ("slope_sites", 3), ("spike_warm_up", 1), ("spike_window", 1)):
            if getattr(self, name) < least:
                raise ArgumentError(f"{name}: needed at least {least}, got {getattr(self, name)}")

    @property
    def n_recent(self) -> int:
        """Number of newest steps that are judged together: a fault has to be found in more than half of them."""
        return max(128, 4 * (self.spike_warm_up + self.window))


DEFAULTS = Thresholds()
