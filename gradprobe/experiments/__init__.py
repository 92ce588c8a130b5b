"""The degradation sweep: networks by depth trained on real data with the probe attached.

Imports flow one way: ``cli`` uses ``sweep``, which uses ``train``, ``data`` and ``store``. ``store`` needs no torch, so
that a report starts at once. ``identity`` uses ``train`` and ``stacks``; ``remedies`` uses ``train``, the nets of
``remedied`` and the theory of ``meanfield``, and gives a ``matrix``.
"""

# Passes over the training set: enough for the digits to show the degradation in a minute.
DEFAULT_EPOCHS = 20
# Steps in which a stack of layers learns y = x.
STACK_STEPS = 1000
# Steps for which each net with a remedy trains.
REMEDY_STEPS = 60
