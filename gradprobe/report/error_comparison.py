"""Compares a network's errors with those of a shallower one, and with its own at an earlier epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradprobe.report.seed_statistics import Spread, clearly_above, sampling_error_pct

EARLIEST_COMPARISON = 0.3
"""Share of the planned epochs before which errors are not compared, as in AUTOTRAINER."""

TRAINED_SHARE = 0.5
"""Largest training error of a network that has begun to train, as a share of that before its first step; ours."""

SLOW_START_STEPS = 400
"""Steps after which a network that has not begun to train is not just slow.

He et al. 2015, section 4.2: ResNet-110, which then trains well, needs about 400 iterations to reach 80 %.
"""

LAST_SHARE = 0.25
"""Share of the epochs so far over which a training error counts as still falling; ours."""

FALLING_SHARE = 0.5
"""Fall of a training error over these epochs that counts, as a share of the difference of two networks; ours."""

ONE_SEED_MARGIN_PCT = 30.0
"""Smallest difference of training errors, in percentage points, that counts if a side has a single seed.

It is far above what seeds change: five seeds of resnet-56 on the digits (20 epochs) have a standard deviation of 1.6
points, those of plain-20 and resnet-20 one of 0.0, and five seeds of the CIFAR-10 networks of He et al. at most 0.3
(test error, an independent reproduction). Even plain-56 on the digits, which hardly trains, ended at 67 % on one
machine and at 87 % on others. The value is ours.
"""

Outcome = Literal["too early", "needs more seeds", "clearly above", "not clearly above"]
"""What a comparison of training errors shows."""

Prematurity = Literal["few epochs", "shallower untrained", "slow start", "still falling"]
"""Why training errors cannot be compared yet."""


@dataclass(frozen=True)
class Errors:
    """Training and test errors of a network after an epoch, one per seed, in percent.

    Attributes:
        train: Training errors.
        test: Test errors.
        is_running: Whether the training errors are running ones; see `gradprobe.report.records.EpochRow`.
    """

    train: Spread
    test: Spread
    is_running: bool = False

    @property
    def train_name(self) -> str:
        """What to call the training errors."""
        return "running training error" if self.is_running else "training error"

    @property
    def gap(self) -> Spread:
        """Test error minus training error, in percentage points."""
        return Spread(tuple(test - train for train, test in zip(self.train.values, self.test.values, strict=True)))


@dataclass(frozen=True)
class Course:
    """How a network's training error, the mean over seeds, came to its value after an epoch.

    Attributes:
        untrained_pct: The error before the first step; NaN if not recorded.
        fall_pct: Points by which it fell over the last `LAST_SHARE` of the epochs; NaN if not recorded.
    """

    untrained_pct: float
    fall_pct: float


@dataclass(frozen=True)
class Comparison:
    """A network and a shallower one of its family, after the same epoch.

    Attributes:
        name: Name of the network.
        other: Name of the shallower network.
        epoch: The epoch.
        earliest: First epoch after which errors are compared.
        errors: Errors of the network.
        other_errors: Errors of the shallower network.
        course: Course of the network's training error.
        other_course: The same of the shallower network.
        falls_from: Epoch from which `Course.fall_pct` is taken.
        steps: Number of steps until `epoch`; None if not recorded.
        test_images: Number of test images; None if not recorded.
    """

    name: str
    other: str
    epoch: int
    earliest: float
    errors: Errors
    other_errors: Errors
    course: Course
    other_course: Course
    falls_from: int
    steps: int | None
    test_images: int | None

    @property
    def has_one_seed(self) -> bool:
        """Whether a side has a single seed, so that its spread over seeds is unknown."""
        return min(len(self.errors.train.values), len(self.other_errors.train.values)) == 1

    @property
    def difference_pct(self) -> float:
        """Points by which the deeper network's mean training error is higher."""
        return self.errors.train.mean - self.other_errors.train.mean

    @property
    def prematurity(self) -> Prematurity | None:
        """Why it is too early to compare the training errors; None if it is not.

        - Few epochs: less than `EARLIEST_COMPARISON` of the planned epochs are done.
        - Shallower untrained: its training error is above `TRAINED_SHARE` of that before its first step.
        - Slow start: that of the deeper network is, after fewer than `SLOW_START_STEPS` steps.
        - Still falling: over the last `LAST_SHARE` of the epochs so far, a training error fell by `FALLING_SHARE` of
          the difference or more, so the deeper network may only be slower.

        Source:
            He et al. 2015, section 1: degradation shows "when deeper networks are able to start converging".
        """
        if self.epoch < self.earliest:
            return "few epochs"
        if self.other_errors.train.mean > TRAINED_SHARE * self.other_course.untrained_pct:
            return "shallower untrained"
        is_untrained = self.errors.train.mean > TRAINED_SHARE * self.course.untrained_pct
        if is_untrained and self.steps is not None and self.steps < SLOW_START_STEPS:
            return "slow start"
        limit = FALLING_SHARE * self.difference_pct
        is_falling = any(course.fall_pct >= limit for course in (self.course, self.other_course))
        return "still falling" if self._is_above and is_falling else None

    @property
    def outcome(self) -> Outcome:
        """What the training errors show about depth.

        "Clearly above" requires that it is not too early, a difference that `seed_statistics.clearly_above` accepts
        and, if a side has a single seed, at least `ONE_SEED_MARGIN_PCT`. A smaller difference of single seeds "needs
        more seeds".
        """
        if self.prematurity:
            return "too early"
        if not self._is_above:
            return "not clearly above"
        return (
            "needs more seeds" if self.has_one_seed and self.difference_pct < ONE_SEED_MARGIN_PCT else "clearly above"
        )

    @property
    def _is_above(self) -> bool:
        return clearly_above(self.errors.train.values, self.other_errors.train.values)

    @property
    def overfits(self) -> bool:
        """Whether the deeper network's test error and its gap are higher by more than seeds and test images explain.

        Requiring the gap too excludes a network that is equally worse on both sets; this condition is ours. Among pairs
        of seeds of the same network, for ten networks on the digits, at most one in 200 was judged to overfit.

        Source:
            He et al. 2015, section 4.2: ResNet-1202 beside ResNet-110, "although both have similar training error".
        """
        if not self.test_images or self.epoch < self.earliest:
            return False
        unit_pct = sampling_error_pct(self.errors.test, self.other_errors.test, self.test_images)
        pairs = ((self.errors.test, self.other_errors.test), (self.errors.gap, self.other_errors.gap))
        return all(clearly_above(ours.values, theirs.values, unit_pct) for ours, theirs in pairs)


@dataclass(frozen=True)
class Rise:
    """A network at the epoch of its lowest test error, and at a later one.

    Attributes:
        lowest_epoch: Epoch of the lowest test error (mean over seeds).
        epoch: The later epoch.
        lowest: Errors at `lowest_epoch`.
        errors: Errors at `epoch`.
        test_images: Number of test images; None if not recorded.
    """

    lowest_epoch: int
    epoch: int
    lowest: Errors
    errors: Errors
    test_images: int | None

    @property
    def overfits(self) -> bool:
        """Whether the test error rose by more than seeds and test images explain while the training error fell.

        Source:
            Prechelt 1998, "Early Stopping - but when?": the test error above its own minimum. His limit is a share of
            that minimum, which a few test images exceed by chance; ours is in standard errors.
        """
        if not self.test_images:
            return False
        unit_pct = sampling_error_pct(self.errors.test, self.lowest.test, self.test_images)
        has_risen = clearly_above(self.errors.test.values, self.lowest.test.values, unit_pct)
        return has_risen and clearly_above(self.lowest.train.values, self.errors.train.values)


@dataclass(frozen=True)
class Learning:
    """A network's training errors before the first step and after an epoch, one per seed.

    Attributes:
        epoch: The epoch.
        steps: Number of steps until then; None if not recorded.
        before: Errors before the first step.
        now: Errors after the epoch.
        train_name: What to call those after the epoch.
    """

    epoch: int
    steps: int | None
    before: Spread
    now: Spread
    train_name: str = "training error"

    @property
    def may_be_slow(self) -> bool:
        """Whether fewer than `SLOW_START_STEPS` were taken, so that it is too early to say that it does not learn."""
        return self.steps is not None and self.steps < SLOW_START_STEPS

    @property
    def has_learned(self) -> bool:
        """Whether the error fell by more than the spread over seeds explains.

        Source:
            AUTOTRAINER (Zhang et al., ICSE 2021) checks after 30 % of the epochs whether training converges; comparing
            with the error before the first step is ours.
        """
        return clearly_above(self.before.values, self.now.values)
