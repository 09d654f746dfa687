"""Why a model does not run in a faster way. Each says why; the slower way goes on."""


class NotNative(Exception):
    """This model's forward cannot become a native program; it runs in torch."""


class NotRecorded(Exception):
    """This step cannot be recorded."""


class Unfit(Exception):
    """A kernel library does not do this model's kind of attention."""
