"""Observes parameters, activations and residual adds while a model trains: from a hook to a row of statistics."""
