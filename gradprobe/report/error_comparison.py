"""Compares a network's errors with those of a shallower one, and with its own at an earlier epoch."""

from __future__ import annotations

from dataclasses import dataclass

from gradprobe.report.seed_statistics import Spread, clearly_above, sampling_error_pct


@dataclass(frozen=True)
class Errors:
    """Training and test errors of a network after an epoch, one per seed, in percent."""

    train: Spread
    test: Spread

    @property
    def gap(self) -> Spread:
        """Test error minus training error, in percentage points."""
        return Spread(tuple(test - train for train, test in zip(self.train.values, self.test.values, strict=True)))


@dataclass(frozen=True)
class Comparison:
    """A network and a shallower one of its family, after the same epoch.

    Attributes:
        other: Name of the shallower network.
        epoch: The epoch.
        errors: Errors of the network.
        other_errors: Errors of the shallower network.
        test_images: Number of test images; None if not recorded.
    """

    other: str
    epoch: int
    errors: Errors
    other_errors: Errors
    test_images: int | None

    @property
    def clearly_above(self) -> bool:
        """Whether the deeper network's training error is higher by more than the spread over seeds explains."""
        return clearly_above(self.errors.train.values, self.other_errors.train.values)

    @property
    def overfits(self) -> bool:
        """Whether the deeper network's test error and its gap are higher by more than seeds and test images explain.

        Requiring the gap too excludes a network that is equally worse on both sets; this condition is ours. Among pairs
        of seeds of the same network, for ten networks on the digits, at most one in 200 was judged to overfit.

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
    """A network's training errors before the first step and after an epoch, one per seed."""

    epoch: int
    before: Spread
    now: Spread

    @property
    def has_learned(self) -> bool:
        """Whether the error fell by more than the spread over seeds explains.

        Source:
            AUTOTRAINER (Zhang et al., ICSE 2021) checks after 30 % of the epochs whether training converges; comparing
            with the error before the first step is ours.
        """
        return clearly_above(self.before.values, self.now.values)
