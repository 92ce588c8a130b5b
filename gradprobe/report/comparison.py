"""Errors of a net beside those of a shallower one, and beside its own of an earlier epoch."""

from __future__ import annotations

from dataclasses import dataclass

from gradprobe.report.spread import Spread, clearly_above, sampling_error_pct


@dataclass(frozen=True)
class Errors:
    """Training and test errors of a net after an epoch, seed by seed, in percent."""

    train: Spread
    test: Spread

    @property
    def gap(self) -> Spread:
        """Test error less training error, in percentage points."""
        return Spread(tuple(test - train for train, test in zip(self.train.values, self.test.values, strict=True)))


@dataclass(frozen=True)
class Comparison:
    """A net and a shallower one of its family, both after the same epoch.

    Attributes:
        other: Name of the shallower net.
        epoch: The epoch.
        errors: Of the net.
        other_errors: Of the shallower net.
        test_images: Number of test images; None where it is not recorded.
    """

    other: str
    epoch: int
    errors: Errors
    other_errors: Errors
    test_images: int | None

    @property
    def clearly_above(self) -> bool:
        """Whether the deeper net's training error is higher by more than seeds explain."""
        return clearly_above(self.errors.train.values, self.other_errors.train.values)

    @property
    def overfits(self) -> bool:
        """Whether the deeper net's test error is higher by more than seeds and test images explain, and its gap too.

        The gap keeps out a net that is worse on both sets alike; it is ours. Of pairs of seeds of the same net, in ten
        nets on the digits, at most one in 200 was told apart.

        Source:
            He et al. 2015, section 4.2: ResNet-1202 beside ResNet-110, "although both have similar training error".
        """
        if not self.test_images:
            return False
        unit_pct = sampling_error_pct(self.errors.test, self.other_errors.test, self.test_images)
        pairs = ((self.errors.test, self.other_errors.test), (self.errors.gap, self.other_errors.gap))
        return all(clearly_above(ours.values, theirs.values, unit_pct) for ours, theirs in pairs)


@dataclass(frozen=True)
class Rise:
    """A net after the epoch of its lowest test error, and after a later one.

    Attributes:
        lowest_epoch: The epoch of the lowest test error, its mean over seeds.
        epoch: The later epoch.
        lowest: Errors at the former.
        errors: Errors at the latter.
        test_images: Number of test images; None where it is not recorded.
    """

    lowest_epoch: int
    epoch: int
    lowest: Errors
    errors: Errors
    test_images: int | None

    @property
    def overfits(self) -> bool:
        """Whether the test error has risen by more than seeds and test images explain, while the training error fell.

        Source:
            Prechelt 1998, "Early Stopping - but when?": the test error above its own minimum. His limit is a share of
            that minimum, which a few test images exceed by chance; this one is in standard errors, and ours.
        """
        if not self.test_images:
            return False
        unit_pct = sampling_error_pct(self.errors.test, self.lowest.test, self.test_images)
        has_risen = clearly_above(self.errors.test.values, self.lowest.test.values, unit_pct)
        return has_risen and clearly_above(self.lowest.train.values, self.errors.train.values)


@dataclass(frozen=True)
class Learning:
    """The training error of a net before its first step, and after an epoch.

    Attributes:
        epoch: The epoch.
        before: The errors before the first step, one per seed.
        now: Those after the epoch.
    """

    epoch: int
    before: Spread
    now: Spread

    @property
    def is_seen(self) -> bool:
        """Whether the error has fallen by more than seeds explain.

        Source:
            AUTOTRAINER (Zhang et al., ICSE 2021) asks after 30 % of the epochs whether training converges; that it is
            asked of the error before the first step is ours.
        """
        return clearly_above(self.before.values, self.now.values)
