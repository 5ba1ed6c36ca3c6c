"""The one error that every problem with a checkpoint ends in."""


class CheckpointError(ValueError):
    """A checkpoint can't be read, is refused, or doesn't fit the network; the message says what, why and what to do."""
