"""How a configuration refuses a value: one line that names it; standard library only."""


def require(condition: bool, message: str) -> None:
    """ValueError with `message`, which names the value and the remedy, unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_one_of(key: str, value: object, allowed: tuple[object, ...]) -> None:
    """ValueError that lists what `key` may be, unless `value` is among it."""
    require(value in allowed, f"{key}={value!r} is not one of {', '.join(map(str, allowed))}")
