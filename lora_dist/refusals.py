"""How a configuration refuses a value: one line that names it; standard library only."""


def require(condition: bool, message: str) -> None:
    """ValueError with `message`, which names the value and the remedy, unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_one_of(key: str, value: object, allowed: tuple[object, ...]) -> None:
    """ValueError that lists what `key` may be, unless `value` is among it."""
    require(value in allowed, f"{key}={value!r} is not one of {', '.join(map(str, allowed))}")


def require_seed(key: str, value: int) -> None:
    """ValueError for what torch's generators do not take."""
    require(0 <= value < 2**63, f"{key}={value} must be at least 0 and below 2^63")
