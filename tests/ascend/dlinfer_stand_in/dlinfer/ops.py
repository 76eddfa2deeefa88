"""No operator."""


def __getattr__(name: str):
    raise AttributeError(f"dlinfer's operator {name!r} was asked for, and this is only its stand-in")
