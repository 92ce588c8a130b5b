"""What a probe observes while a model trains, from a hook to a row of statistics."""
