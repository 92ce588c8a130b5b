"""Experiments on depth: the degradation sweep, the identity experiment, and the comparison of remedies.

The defaults below are here so that the command line reads them without importing torch.
"""

# Passes over the training set: enough for the digits to show degradation within a minute.
DEFAULT_EPOCHS = 20
# Training steps of a stack of layers that learns y = x.
STACK_STEPS = 1000
# Training steps of each network with a remedy.
REMEDY_STEPS = 60
