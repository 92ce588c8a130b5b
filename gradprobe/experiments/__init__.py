"""Experiments on depth: the degradation sweep, the identity that deep stacks do not find, and the remedies."""

# Passes over the training set: enough for the digits to show the degradation in a minute.
DEFAULT_EPOCHS = 20
# Steps in which a stack of layers learns y = x.
STACK_STEPS = 1000
# Steps for which each net with a remedy trains.
REMEDY_STEPS = 60
