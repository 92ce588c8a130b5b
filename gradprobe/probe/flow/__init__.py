"""The parts of `check_gradient_flow`: inputs, the graph of the loss, the trunk, what starts at zero, and the report."""
