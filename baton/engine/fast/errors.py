"""Why a model does not run natively."""


class NotNative(Exception):
    """This model's forward cannot become a native program; it runs in torch. Says why."""
