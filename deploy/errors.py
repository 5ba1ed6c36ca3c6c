"""The one exception of this room, in a file of its own so that every module can import it without a cycle."""


class DeployError(RuntimeError):
    """A graph, an engine or a runtime is not usable; the message names value, expectation, remedy."""
